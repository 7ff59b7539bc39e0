"""Attention with TMA loads and warp specialisation, for sm_90: one group of warps loads, the others compute.

The descriptors are made in the kernel, one pair for each sample and head, and end at `kv_len`: the hardware fills what
lies behind with zeros, so padding may hold anything, NaN included. The compiler specialises warps only where the loop
loads nothing but through descriptors, and with `num_warps=4`; a gate of the compile tests looks for `setmaxnreg`.
"""

import triton
import triton.language as tl

from tdm_kernels.attention.triton_softmax import LOG2_E, finish, fold


@triton.jit
def attention(
    q,
    k,
    v,
    kv_len,
    q_batch,
    q_head,
    q_line,
    k_batch,
    k_head,
    k_line,
    v_batch,
    v_head,
    v_line,
    out_batch,
    out_head,
    out_line,
    q_lines,
    k_lines,
    heads,
    out,
    lse,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid and parameters as in `triton_pointer`; strides and pointers must be multiples of 16 bytes."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = k_lines
    if kv_len is not None:
        length = tl.minimum(tl.load(kv_len + batch), k_lines)
    start = tl.program_id(0) * ROWS
    queries = tl.make_tensor_descriptor(
        q + batch * q_batch + head * q_head, shape=[q_lines, HEAD], strides=[q_line, 1], block_shape=[ROWS, HEAD]
    )
    keys = tl.make_tensor_descriptor(
        k + batch * k_batch + head * k_head, shape=[length, HEAD], strides=[k_line, 1], block_shape=[KEYS, HEAD]
    )
    values = tl.make_tensor_descriptor(
        v + batch * v_batch + head * v_head, shape=[length, HEAD], strides=[v_line, 1], block_shape=[KEYS, HEAD]
    )
    query = queries.load([start, 0])  # (ROWS, HEAD)

    scale: tl.constexpr = LOG2_E / HEAD**0.5
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, length, KEYS, warp_specialize=True):
        key = keys.load([first, 0])  # (KEYS, HEAD)
        scores = tl.dot(query, key.T, input_precision="ieee")  # (ROWS, KEYS)
        scores = tl.where((first + tl.arange(0, KEYS))[None, :] < length, scores, float("-inf"))
        value = values.load([first, 0])  # (KEYS, HEAD)
        acc, top, total = fold(scores, value, acc, top, total, scale)

    average, log_sum = finish(acc, top, total)
    rows = start + tl.arange(0, ROWS)
    channels = tl.arange(0, HEAD)
    target = out + batch * out_batch + head * out_head + rows[:, None].to(tl.int64) * out_line + channels[None, :]
    tl.store(target, average.to(out.dtype.element_ty), mask=rows[:, None] < q_lines)
    if lse is not None:
        tl.store(lse + (batch * heads + head) * q_lines + rows, log_sum, mask=rows < q_lines)
