"""Small kernels that use bfloat16 and fp8 in every way that ours do."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    """out (SIZE, SIZE) float32 = a @ b, both bfloat16 (SIZE, SIZE)."""
    lines = tl.arange(0, SIZE)
    offsets = lines[:, None] * SIZE + lines[None, :]
    tl.store(out + offsets, tl.dot(tl.load(a + offsets), tl.load(b + offsets)))


@triton.jit
def elementwise(a, b, out, larger, SIZE: tl.constexpr):
    """out bfloat16 = -(a + b) * a; larger = a > b; all (SIZE,) bfloat16."""
    lines = tl.arange(0, SIZE)
    x, y = tl.load(a + lines), tl.load(b + lines)
    tl.store(out + lines, -(x + y) * x)
    tl.store(larger + lines, (x > y).to(tl.int8))


@triton.jit
def narrow(a, out, SIZE: tl.constexpr):
    """out, bfloat16 or fp8, = a float32."""
    lines = tl.arange(0, SIZE)
    tl.store(out + lines, tl.load(a + lines).to(out.dtype.element_ty))
