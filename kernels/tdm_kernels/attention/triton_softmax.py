"""One step of a streamed softmax, shared by the attention kernels: fold one tile of keys and values into the result."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold(scores, value, acc, top, total, scale, SHIFT: tl.constexpr = 0, EXACT: tl.constexpr = None):
    """Streamed softmax over one tile.

    scores (ROWS, KEYS) float32 before scaling, -inf where there is no key; value (KEYS, HEAD). acc (ROWS, HEAD), top
    and total (ROWS,) are the running numerator, maximum and denominator; `scale` > 0 includes log2(e), so that powers
    are of 2. At least one key of the tile must exist. Returns the new three.
    """
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - (higher - SHIFT)[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(value.dtype)
    acc = tl.dot(weights, value, acc * shrink[:, None], input_precision="ieee", max_num_imprecise_acc=EXACT)
    return acc, higher, total


@triton.jit
def finish(acc, top, total):
    """The softmax average (ROWS, HEAD) and the natural log-sum-exp (ROWS,). Rows without any key give 0 and -inf."""
    divisor = tl.where(total > 0, total, 1.0)
    return acc / divisor[:, None], (top + tl.log2(divisor)) * LN_2  # without keys, top is -inf
