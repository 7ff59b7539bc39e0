"""GroupNorm and SiLU over channels-last memory: pixels are rows, the channels of a group lie together.

A group takes LANES channels of a tile, the next power of two; where it has fewer, the rest of them are masked.

Three launches: moments of every tile, their sum for each sample and group, and the tiles once more to normalise. Tiles
keep their own mean and squared deviation from it, which are then joined (Chan, Golub and LeVeque 1983), so nothing
cancels however far the mean is from zero.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(part, CHANNELS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Channels of the tile's columns (CHANNELS,), and which of them exist."""
    lanes = tl.arange(0, CHANNELS)
    if GROUP == LANES:  # said so that the compiler sees that they lie together
        columns = part * CHANNELS + lanes
        own = lanes >= 0
    else:
        columns = (part * (CHANNELS // LANES) + lanes // LANES) * GROUP + lanes % LANES
        own = lanes % LANES < GROUP
    return columns, own


@triton.jit
def moments(
    x,
    pixels,
    channels,
    means,
    deviations,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (tiles, groups / (CHANNELS / LANES), batch). x (batch, pixels, channels).

    Fills means and deviations (batch, groups, tiles) float32: of each group's values in a tile of PIXELS, their mean
    and the sum of squared differences from it. GROUP channels make a group.
    """
    tile, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile * PIXELS + tl.arange(0, PIXELS)
    columns, own = _columns(part, CHANNELS, GROUP, LANES)
    there = rows[:, None] < pixels
    if GROUP != LANES:
        there = there & own[None, :]
    offsets = (batch * pixels + rows[:, None].to(tl.int64)) * channels + columns[None, :]
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)  # (PIXELS, CHANNELS)
    size: tl.constexpr = CHANNELS // LANES  # groups in a part
    count = (tl.minimum(pixels - tile * PIXELS, PIXELS) * GROUP).to(tl.float32)
    mean = tl.sum(tl.reshape(tl.sum(values, 0), (size, LANES)), 1) / count  # (size,)
    spread = tl.reshape(tl.broadcast_to(mean[:, None], (size, LANES)), (CHANNELS,))
    apart = tl.where(there, values - spread[None, :], 0.0)
    deviation = tl.sum(tl.reshape(tl.sum(apart * apart, 0), (size, LANES)), 1)
    groups = part * size + tl.arange(0, size)
    target = (batch * (channels // GROUP) + groups) * tl.num_programs(0) + tile
    tl.store(means + target, mean)
    tl.store(deviations + target, deviation)


@triton.jit
def join(
    means,
    deviations,
    pixels,
    tiles,
    mean,
    scale,
    eps: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (batch * groups,): joins the moments of a group's tiles. Fills mean and scale = 1 / sqrt(variance + eps)."""
    group = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILES)
    total = tl.zeros((TILES,), tl.float32)
    for first in tl.range(0, tiles, TILES):
        which = first + lanes
        count = tl.minimum(pixels - which * PIXELS, PIXELS).to(tl.float32)
        total += tl.load(means + group * tiles + which, mask=which < tiles, other=0.0) * count
    middle = tl.sum(total, 0) / pixels
    spread = tl.zeros((TILES,), tl.float32)
    for first in tl.range(0, tiles, TILES):
        which = first + lanes
        count = tl.minimum(pixels - which * PIXELS, PIXELS).to(tl.float32)
        apart = tl.load(means + group * tiles + which, mask=which < tiles, other=middle) - middle
        inside = tl.load(deviations + group * tiles + which, mask=which < tiles, other=0.0)
        spread += inside + apart * apart * count * GROUP
    tl.store(mean + group, middle)
    tl.store(scale + group, tl.rsqrt(tl.sum(spread, 0) / (pixels.to(tl.float32) * GROUP) + eps))


@triton.jit
def apply(
    x,
    weight,
    bias,
    mean,
    scale,
    pixels,
    channels,
    out,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid and layout as in `moments`. out = silu((x - mean) * scale * weight + bias)."""
    tile, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile * PIXELS + tl.arange(0, PIXELS)
    columns, own = _columns(part, CHANNELS, GROUP, LANES)
    there = rows[:, None] < pixels
    if GROUP != LANES:
        there = there & own[None, :]
    offsets = (batch * pixels + rows[:, None].to(tl.int64)) * channels + columns[None, :]
    groups = batch * (channels // GROUP) + columns // GROUP
    if GROUP == LANES:
        factor = tl.load(scale + groups) * tl.load(weight + columns).to(tl.float32)
        middle = tl.load(mean + groups)
        shift = tl.load(bias + columns).to(tl.float32)
    else:
        factor = tl.load(scale + groups, mask=own, other=0.0)
        factor *= tl.load(weight + columns, mask=own, other=0.0).to(tl.float32)
        middle = tl.load(mean + groups, mask=own, other=0.0)
        shift = tl.load(bias + columns, mask=own, other=0.0).to(tl.float32)
    values = tl.where(there, tl.load(x + offsets, mask=there, other=0.0).to(tl.float32), middle[None, :])
    normal = (values - middle[None, :]) * factor[None, :] + shift[None, :]
    tl.store(out + offsets, (normal * tl.sigmoid(normal)).to(out.dtype.element_ty), mask=there)
