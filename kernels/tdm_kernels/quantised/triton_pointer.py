"""Attention of int8 queries and keys with pointer loads; values are 16 bits wide, or fp8 with a scale for each channel.

fp8 values lie the other way round in memory, the keys of one channel together, as Hopper's matrix products want them.

Scores are exact sums of integers, scaled by one number for each pair of blocks, so a tile has as many queries as share
a scale, and as many keys. With fp8 values the weights of the softmax are fp8 as well, in (0, 256].
"""

import triton
import triton.language as tl

from tdm_kernels.attention.triton_softmax import LOG2_E, finish, fold

FP8_SHIFT = tl.constexpr(8)


@triton.jit
def _tile(query, keys, values, lines, left, acc, top, total, scale, PARTIAL: tl.constexpr, FP8: tl.constexpr):
    """Folds one tile of keys; `lines` are the tile's lines (KEYS,), of which `left` exist where PARTIAL."""
    if PARTIAL:
        key = tl.load(keys, mask=lines[None, :] < left, other=0)  # (HEAD, KEYS)
    else:
        key = tl.load(keys)
    scores = tl.dot(query, key).to(tl.float32)  # (ROWS, KEYS)
    if PARTIAL:
        scores = tl.where(lines[None, :] < left, scores, float("-inf"))
        value = tl.load(values, mask=lines[:, None] < left, other=0.0)  # (KEYS, HEAD)
    else:
        value = tl.load(values)
    if FP8:
        acc, top, total = fold(scores, value, acc, top, total, scale, FP8_SHIFT, keys.shape[1])
    else:
        acc, top, total = fold(scores, value, acc, top, total, scale)
    return acc, top, total


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
    """Grid (cdiv(q_lines, ROWS), heads, batch). q and k are contiguous (batch, heads, lines, HEAD) int8.

    q_scale (batch, heads, cdiv(q_lines, ROWS)) and k_scale (batch, heads, cdiv(k_lines, KEYS)) float32; v_scale (batch,
    heads, HEAD) where v is fp8, else None; kv_len (batch,) int32 or None. v_step is the stride of keys of 16-bit
    values, and that of channels of fp8 ones; the other one is 1.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    stream = batch * heads + head
    length = k_lines
    if kv_len is not None:
        length = tl.minimum(tl.load(kv_len + batch), k_lines)
    fp8: tl.constexpr = v_scale is not None
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lines = tl.arange(0, KEYS)
    channels = tl.arange(0, HEAD)
    inside = rows[:, None] < q_lines
    query = tl.load(q + (stream * q_lines + rows[:, None]) * HEAD + channels[None, :], mask=inside, other=0)
    keys = k + (stream * k_lines + lines[None, :]) * HEAD + channels[:, None]
    if fp8:
        v_line, v_channel = 1, v_step
    else:
        v_line, v_channel = v_step, 1
    values = v + batch * v_batch + head * v_head + lines[:, None] * v_line + channels[None, :] * v_channel
    row_scale = tl.load(q_scale + stream * tl.num_programs(0) + tl.program_id(0)) * (LOG2_E / HEAD**0.5)
    key_scales = k_scale + stream * tl.cdiv(k_lines, KEYS)

    acc = tl.zeros((ROWS, HEAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    full = length // KEYS
    for block in tl.range(full):
        scale = row_scale * tl.load(key_scales + block)
        acc, top, total = _tile(query, keys, values, lines, KEYS, acc, top, total, scale, False, fp8)
        keys += KEYS * HEAD
        values += KEYS * v_line
    left = length - full * KEYS
    if left > 0:
        scale = row_scale * tl.load(key_scales + full)
        acc, top, total = _tile(query, keys, values, lines, left, acc, top, total, scale, True, fp8)

    average, _ = finish(acc, top, total)
    if v_scale is not None:
        average *= tl.load(v_scale + stream * HEAD + channels)[None, :]
    target = out + batch * out_batch + head * out_head + rows[:, None].to(tl.int64) * out_line + channels[None, :]
    tl.store(target, average.to(out.dtype.element_ty), mask=inside)
