"""Attention with pointer loads (cp.async), for every card from sm_80 on.

Full tiles of keys run without any mask; only the last one, where `kv_len` ends inside a tile, is masked. Keys behind
`kv_len` are never read, so padding costs nothing and may hold anything. The order of the parameters (inputs, integers,
outputs, nothing floating) is the one that TensorRT's plugins ask for.
"""

import triton
import triton.language as tl

from tdm_kernels.attention.triton_softmax import LOG2_E, finish, fold


@triton.jit
def _tile(query, keys, values, lines, left, acc, top, total, scale, PARTIAL: tl.constexpr):
    """Folds one tile of keys; `lines` are the tile's lines (KEYS,), of which `left` exist where PARTIAL."""
    if PARTIAL:
        key = tl.load(keys, mask=lines[None, :] < left, other=0.0)  # (HEAD, KEYS)
    else:
        key = tl.load(keys)
    scores = tl.dot(query, key, input_precision="ieee")  # (ROWS, KEYS)
    if PARTIAL:
        scores = tl.where(lines[None, :] < left, scores, float("-inf"))
        value = tl.load(values, mask=lines[:, None] < left, other=0.0)  # (KEYS, HEAD)
    else:
        value = tl.load(values)
    return fold(scores, value, acc, top, total, scale)


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
    """Grid (cdiv(q_lines, ROWS), heads, batch). X_batch, X_head, X_line are strides of X in elements.

    kv_len (batch,) int32 or None; lse (batch, heads, q_lines) float32 or None.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = k_lines
    if kv_len is not None:
        length = tl.minimum(tl.load(kv_len + batch), k_lines)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lines = tl.arange(0, KEYS)
    channels = tl.arange(0, HEAD)
    inside = rows[:, None] < q_lines
    queries = q + batch * q_batch + head * q_head + rows[:, None].to(tl.int64) * q_line + channels[None, :]
    query = tl.load(queries, mask=inside, other=0.0)  # (ROWS, HEAD)
    keys = k + batch * k_batch + head * k_head + lines[None, :] * k_line + channels[:, None]
    values = v + batch * v_batch + head * v_head + lines[:, None] * v_line + channels[None, :]

    scale: tl.constexpr = LOG2_E / HEAD**0.5
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    full = length // KEYS
    for _ in tl.range(full):
        acc, top, total = _tile(query, keys, values, lines, KEYS, acc, top, total, scale, False)
        keys += KEYS * k_line
        values += KEYS * v_line
    left = length - full * KEYS
    if left > 0:
        acc, top, total = _tile(query, keys, values, lines, left, acc, top, total, scale, True)

    average, log_sum = finish(acc, top, total)
    target = out + batch * out_batch + head * out_head + rows[:, None].to(tl.int64) * out_line + channels[None, :]
    tl.store(target, average.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + (batch * heads + head) * q_lines + rows, log_sum, mask=rows < q_lines)
