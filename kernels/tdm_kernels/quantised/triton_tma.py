"""Attention of int8 queries and keys with TMA loads and warp specialisation, for sm_90. See `attention.triton_tma`."""

import triton
import triton.language as tl

from tdm_kernels.attention.triton_softmax import LOG2_E, finish, fold
from tdm_kernels.quantised.triton_pointer import FP8_SHIFT


@triton.jit
def attention(
    q,
    q_scale,
    k,
    k_scale,
    v,
    v_scale,
    kv_len,
    v_batch,
    v_head,
    v_step,
    out_batch,
    out_head,
    out_line,
    q_lines,
    k_lines,
    heads,
    out,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid and parameters as in `triton_pointer`; strides of v and all pointers must be multiples of 16 bytes."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    stream = batch * heads + head
    length = k_lines
    if kv_len is not None:
        length = tl.minimum(tl.load(kv_len + batch), k_lines)
    start = tl.program_id(0) * ROWS
    queries = tl.make_tensor_descriptor(
        q + stream * q_lines * HEAD, shape=[q_lines, HEAD], strides=[HEAD, 1], block_shape=[ROWS, HEAD]
    )
    keys = tl.make_tensor_descriptor(
        k + stream * k_lines * HEAD, shape=[length, HEAD], strides=[HEAD, 1], block_shape=[KEYS, HEAD]
    )
    own = v + batch * v_batch + head * v_head
    if v_scale is None:
        values = tl.make_tensor_descriptor(own, shape=[length, HEAD], strides=[v_step, 1], block_shape=[KEYS, HEAD])
    else:
        values = tl.make_tensor_descriptor(own, shape=[HEAD, length], strides=[v_step, 1], block_shape=[HEAD, KEYS])
    query = queries.load([start, 0])  # (ROWS, HEAD)
    row_scale = tl.load(q_scale + stream * tl.num_programs(0) + tl.program_id(0)) * (LOG2_E / HEAD**0.5)
    key_scales = k_scale + stream * tl.cdiv(k_lines, KEYS)

    acc = tl.zeros((ROWS, HEAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, length, KEYS, warp_specialize=True):
        key = keys.load([first, 0])  # (KEYS, HEAD)
        scores = tl.dot(query, key.T).to(tl.float32)  # (ROWS, KEYS)
        scores = tl.where((first + tl.arange(0, KEYS))[None, :] < length, scores, float("-inf"))
        scale = row_scale * tl.load(key_scales + first // KEYS)
        if v_scale is None:
            acc, top, total = fold(scores, values.load([first, 0]), acc, top, total, scale)
        else:
            value = values.load([0, first]).T  # (KEYS, HEAD)
            acc, top, total = fold(scores, value, acc, top, total, scale, FP8_SHIFT, KEYS)

    average, _ = finish(acc, top, total)
    channels = tl.arange(0, HEAD)
    if v_scale is not None:
        average *= tl.load(v_scale + stream * HEAD + channels)[None, :]
    rows = start + tl.arange(0, ROWS)
    target = out + batch * out_batch + head * out_head + rows[:, None].to(tl.int64) * out_line + channels[None, :]
    tl.store(target, average.to(out.dtype.element_ty), mask=rows[:, None] < q_lines)
