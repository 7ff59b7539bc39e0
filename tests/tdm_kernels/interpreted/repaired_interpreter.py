"""Makes Triton's interpreter compute with bfloat16 instead of with its bit patterns, and round to fp8 as hardware does.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 tensors as uint16 arrays and hands these to numpy: sums, products
and matrix products of them are sums and products of bit patterns, without any error, and casts to bfloat16 cut instead
of rounding. Here operands become float32 numbers first, and results are rounded to the nearest even.

Its casts to fp8 lose the carry where rounding up fills all bits of the mantissa: 1.95 becomes 1 instead of 2. Here
torch casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Method = Callable[..., Any]
FP8_TOP = 448.0


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def numbers(handle: Any) -> Any:
    """The values of a handle, as float32 where they are bfloat16 bits."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if is_bf16(handle) else handle.data


def rounded(values: Any) -> Any:
    """A bfloat16 handle of numbers: the upper half of float32 after rounding to the nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    halves = ((bits.astype(np.uint64) + 0x7FFF + odd) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), halves), tl.bfloat16)


def create_dot(original: Method, a: Any, b: Any, d: Any, *how: Any) -> Any:
    if not is_bf16(a):
        return original(a, b, d, *how)
    return TensorHandle(np.matmul(numbers(a), numbers(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def binary_op(original: Method, left: Any, right: Any, op: Method) -> Any:
    if not is_bf16(left):
        return original(left, right, op)
    result = op(numbers(left), numbers(right))
    return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else rounded(result)


def unary_op(original: Method, x: Any, op: Method) -> Any:
    return rounded(op(numbers(x))) if is_bf16(x) else original(x, op)


def cast_impl(original: Method, x: Any, target: Any) -> Any:
    if is_bf16(x) and target.scalar != tl.float32:
        raise NotImplementedError(f"the interpreter casts bfloat16 bits to {target}; cast to float32 first")
    return rounded(x.data) if target.scalar == tl.bfloat16 else original(x, target)


def create_fp_to_fp(original: Method, x: Any, target: Any, mode: Any) -> Any:
    if target.scalar == tl.float8e4nv and x.dtype.scalar == tl.float32:
        values = torch.from_numpy(np.ascontiguousarray(x.data)).clamp(-FP8_TOP, FP8_TOP)  # hardware saturates
        return TensorHandle(values.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)
    return rounded(x.data) if target.scalar == tl.bfloat16 else original(x, target, mode)


def refuse(original: Method, x: Any, *others: Any) -> Any:
    if is_bf16(x):
        raise NotImplementedError("this operation on bfloat16 is wrong in the interpreter; cast to float32 first")
    return original(x, *others)


REPAIRED = (create_dot, binary_op, unary_op, cast_impl, create_fp_to_fp)
REFUSED = ("create_fma", "create_clampf", "create_rsqrt", "create_erf")  # as wrong, and no kernel of ours uses them


@contextmanager
def repaired_interpreter() -> Iterator[None]:
    """While it is entered, the interpreter computes as hardware does."""
    repairs = {function.__name__: function for function in REPAIRED} | dict.fromkeys(REFUSED, refuse)
    with pytest.MonkeyPatch.context() as patch:
        for name, repair in repairs.items():
            patch.setattr(InterpreterBuilder, name, _method(repair, getattr(InterpreterBuilder, name)))
        yield


def _method(repair: Method, original: Method) -> Method:
    def method(self: Any, *arguments: Any) -> Any:
        return repair(partial(original, self), *arguments)

    return method
