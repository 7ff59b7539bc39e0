"""Checks of arguments that run before anything is launched. Each raises BadArgument with the value and what is allowed.

All of them look at shapes, dtypes and devices only, so they cost microseconds and never wait for a device. What can
only be known by reading a tensor on a device is checked on the CPU always, and elsewhere where TDM_SERVE_DEBUG=1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tdm_kernels.errors import BadArgument


def debug() -> bool:
    """Whether values may be read back from the device to check them, which makes every call wait."""
    return os.environ.get("TDM_SERVE_DEBUG", "") not in ("", "0")


def spell(dtypes: Sequence[torch.dtype]) -> str:
    """`float16, bfloat16 or float32`"""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def check_dtype(tensors: Mapping[str, Tensor], allowed: Sequence[torch.dtype]) -> None:
    """All of one dtype, and that is allowed."""
    first, *_ = tensors
    dtype = tensors[first].dtype
    if dtype not in allowed:
        raise BadArgument(f"{first} is {spell([dtype])}; allowed: {spell(allowed)}")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise BadArgument(f"{name} is {spell([tensor.dtype])}, but {first} is {spell([dtype])}; they must be equal")


def check_device(tensors: Mapping[str, Tensor]) -> None:
    """All on one device."""
    first, *_ = tensors
    for name, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            device = tensors[first].device
            raise BadArgument(f"{name} is on {tensor.device}, but {first} is on {device}; they must be on one device")


def check_shape(name: str, tensor: Tensor, wanted: Mapping[str, int | None]) -> None:
    """As many dimensions as `wanted` names, of its sizes; None leaves a size open, though not empty."""
    layout = ", ".join(wanted)
    if tensor.dim() != len(wanted):
        raise BadArgument(f"{name} has shape {tuple(tensor.shape)}; it needs {len(wanted)} dimensions ({layout})")
    for axis, (letter, size) in enumerate(wanted.items()):
        if size is None and tensor.shape[axis] < 1:
            raise BadArgument(f"{name} has shape {tuple(tensor.shape)}; {letter} must be at least 1")
        if size is not None and tensor.shape[axis] != size:
            raise BadArgument(f"{name} has shape {tuple(tensor.shape)}; in ({layout}), {letter} must be {size}")


def check_rows_contiguous(tensors: Mapping[str, Tensor]) -> None:
    """The last dimension lies without gaps, which every load of a kernel relies on."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise BadArgument(
                f"{name} has strides {tuple(tensor.stride())}; the last must be 1, so call .contiguous() first"
            )


def check_lengths(name: str, lengths: Tensor, batch: int, device: torch.device) -> None:
    """int32, one for each sample, on the device of the others. `check_length_values` looks at the values."""
    check_dtype({name: lengths}, (torch.int32,))
    check_shape(name, lengths, {"B": batch})
    if lengths.device != device:
        raise BadArgument(f"{name} is on {lengths.device}, but the other tensors are on {device}")


def check_length_values(name: str, lengths: Tensor, least: int, most: int) -> None:
    """Every length within [least, most]; on a device other than the CPU only where debugging is on."""
    if lengths.device.type != "cpu" and not debug():
        return
    low, high = (int(value) for value in torch.aminmax(lengths))
    if low < least or high > most:
        raise BadArgument(f"{name} has values from {low} to {high}; allowed: {least} to {most}")
