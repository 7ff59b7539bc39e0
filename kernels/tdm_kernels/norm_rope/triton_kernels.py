"""RMS-norm and rotary embedding of queries and keys, plain and with quantisation to int8.

The quantising pair reads the keys twice and writes them once: `key_sums` norms and turns them to add them up, and
`to_int8` does it again to take off their mean. Writing the turned keys in between would cost more.
"""

import triton
import triton.language as tl

TOP = tl.constexpr(127.0)
SMALLEST = tl.constexpr(1e-12)


@triton.jit
def _turned(x, weight, cos, sin, steps, there, lines, row, eps, HEAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of x, normed and turned, in float32 (ROWS, HEAD).

    Row i begins `steps[i]` elements behind x, is token lines[i], and exists where there[i]. Its sample's
    first token is row `row` of cos and sin.
    """
    half: tl.constexpr = HEAD // 2
    pairs = tl.arange(0, half)
    channels = tl.arange(0, HEAD)
    values = tl.load(x + steps[:, None] + channels[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(values * values, 1) / HEAD + eps)
        values = values * scale[:, None] * tl.load(weight + channels).to(tl.float32)[None, :]
    if cos is not None:
        angles = (row + lines[:, None]) * half + pairs[None, :]
        c = tl.load(cos + angles, mask=there[:, None], other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=there[:, None], other=0.0).to(tl.float32)
        if INTERLEAVED:
            one, other = tl.split(tl.reshape(values, (values.shape[0], half, 2)))
            values = tl.reshape(tl.join(one * c - other * s, one * s + other * c), (values.shape[0], HEAD))
        else:
            halves = tl.permute(tl.reshape(values, (values.shape[0], 2, half)), (0, 2, 1))
            one, other = tl.split(halves)
            turned = tl.join(one * c - other * s, one * s + other * c)  # (ROWS, half, 2)
            values = tl.reshape(tl.permute(turned, (0, 2, 1)), (values.shape[0], HEAD))
    return values


@triton.jit
def _one(
    x,
    weight,
    cos,
    sin,
    x_batch,
    x_line,
    x_head,
    tokens,
    heads,
    out,
    eps,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EACH: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lines, head = rows // heads, rows % heads
    there = lines < tokens
    steps = batch * x_batch + lines.to(tl.int64) * x_line + head * x_head
    row = batch * tokens if EACH else 0
    values = _turned(x, weight, cos, sin, steps, there, lines, row, eps, HEAD, INTERLEAVED)
    target = out + (batch * tokens * heads + rows[:, None].to(tl.int64)) * HEAD + tl.arange(0, HEAD)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def norm_rope(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_batch,
    q_line,
    q_head,
    k_batch,
    k_line,
    k_head,
    tokens,
    heads,
    q_out,
    k_out,
    eps: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EACH: tl.constexpr,
):
    """Grid (cdiv(tokens * heads, ROWS), 2, batch): queries, then keys. Results are (batch, tokens, heads, HEAD).

    cos and sin are (tokens, HEAD / 2), or (batch, tokens, HEAD / 2) where EACH sample has its own; so below.
    """
    if tl.program_id(1) == 0:
        _one(q, q_weight, cos, sin, q_batch, q_line, q_head, tokens, heads, q_out, eps, HEAD, ROWS, INTERLEAVED, EACH)
    else:
        _one(k, k_weight, cos, sin, k_batch, k_line, k_head, tokens, heads, k_out, eps, HEAD, ROWS, INTERLEAVED, EACH)


@triton.jit
def key_sums(
    k,
    weight,
    cos,
    sin,
    kv_len,
    k_batch,
    k_line,
    k_head,
    tokens,
    heads,
    sums,
    eps: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EACH: tl.constexpr,
):
    """Grid (cdiv(tokens, BLOCK), heads, batch). Fills sums (batch, heads, blocks, HEAD): of each block's valid keys."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tokens
    if kv_len is not None:
        length = tl.minimum(tl.load(kv_len + batch), tokens)
    lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = lines < length
    steps = batch * k_batch + head * k_head + lines.to(tl.int64) * k_line
    row = batch * tokens if EACH else 0
    values = _turned(k, weight, cos, sin, steps, there, lines, row, eps, HEAD, INTERLEAVED)  # zeros where not there
    target = ((batch * heads + head) * tl.num_programs(0) + tl.program_id(0)) * HEAD + tl.arange(0, HEAD)
    tl.store(sums + target, tl.sum(values, 0))


@triton.jit
def to_int8(
    x,
    weight,
    cos,
    sin,
    mean,
    kv_len,
    x_batch,
    x_line,
    x_head,
    tokens,
    heads,
    out,
    scales,
    eps: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EACH: tl.constexpr,
):
    """Grid (cdiv(tokens, BLOCK), heads, batch). out (batch, heads, tokens, HEAD), scales (batch, heads, blocks).

    mean (batch, heads, HEAD) is taken off first; without it (None), nothing is. Behind kv_len, out is zero.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tokens
    if kv_len is not None:
        length = tl.minimum(tl.load(kv_len + batch), tokens)
    lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, HEAD)
    there = lines < length
    steps = batch * x_batch + head * x_head + lines.to(tl.int64) * x_line
    row = batch * tokens if EACH else 0
    values = _turned(x, weight, cos, sin, steps, there, lines, row, eps, HEAD, INTERLEAVED)
    if mean is not None:
        middle = tl.load(mean + (batch * heads + head) * HEAD + channels)
        values = tl.where(there[:, None], values - middle[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0) / TOP, SMALLEST)
    whole = tl.floor(values / scale + 0.5)
    whole = tl.minimum(tl.maximum(whole, -TOP), TOP).to(tl.int8)
    target = ((batch * heads + head) * tokens + lines[:, None]) * HEAD + channels[None, :]
    tl.store(out + target, whole, mask=lines[:, None] < tokens)
    tl.store(scales + (batch * heads + head) * tl.num_programs(0) + tl.program_id(0), scale)
