"""Which kernels the layers of a network call in place of plain torch, decided once, when it is on its device.

Nothing is called where nothing is chosen (TDM_SERVE_KERNELS, TDM_SERVE_ATTENTION, docs/kernels.md): on a CPU the layers
are torch's, to the bit. Graphs for other runtimes hold the plain layers, whatever was chosen.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, cast

from torch import Tensor, nn

from tdm_kernels import KernelUnavailable, choices
from tdm_kernels.dispatch import quantises
from tdm_serve.errors import BackendUnavailable

HeadPath = Literal["plain", "fused", "16-bit", "fp8"]  # the last two: quantised attention, by how it holds its values


@contextmanager
def told() -> Generator[None]:
    """An explicit choice that cannot run, as an error of this package."""
    try:
        yield
    except KernelUnavailable as error:
        raise BackendUnavailable(str(error)) from error


def norm_path(norm: nn.Module) -> HeadPath:
    """How queries and keys go through RMS-norms like `norm`: "plain", or "fused" with their rotation."""
    with told():
        return "fused" if choices.qk_norm_rope(_heads(norm)) else "plain"


def attention_path(norm: nn.Module) -> HeadPath:
    """The same for a layer whose attention can be quantised."""
    with told():
        return choices.quantised_attention(_heads(norm)) or norm_path(norm)


def _heads(norm: nn.Module) -> Tensor:
    """(1, 1, 1, D), of the kind that `norm` takes."""
    weight = cast(Tensor, norm.weight)  # (D,)
    return weight.new_empty(1, 1, 1, len(weight))


def check_quantised(family: str, quantisable: bool) -> None:
    """Raises BackendUnavailable where quantised attention is asked of a family that has none."""
    if quantises() and not quantisable:
        raise BackendUnavailable(
            f"TDM_SERVE_ATTENTION=quantised is for the family zimage, and this model is of {family}; "
            "allowed there: auto, triton, cudnn, flash, sdpa"
        )
