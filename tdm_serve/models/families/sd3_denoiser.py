"""The transformer of SD3 and SD3.5 as one batched function over the parameters of diffusers' class.

What `diffusers.SD3Transformer2DModel` repeats in every call is done once here: text is projected once per prompt
(`refine_text`), and all that follows from time and pooled text is one table per noise level and prompt (`modulation`).
The text that `forward` takes holds the prompt's tokens and, as its last row, the projected pooled embedding, so that
one tensor per prompt is all there is to keep.

Tokens are ordered image, then text, as in the original. The text encoders' padding is attended: SD3 is trained that
way. Texts of several lengths share a forward nevertheless (`lengths`). The state dict has the keys of diffusers' class,
packed or not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from tdm_serve.models.families.attention import attend, normed_heads
from tdm_serve.models.joined import Joined, pack_all, present, rms, share
from tdm_serve.models.kernel_choice import HeadPath, norm_path
from tdm_serve.models.naming import named_as
from tdm_serve.models.routed import Route, Routed, project

IMAGE_ROWS, DUAL_ROWS, TEXT_ROWS, LAST_ROWS = 6, 9, 6, 2  # vectors of modulation in each kind of layer
SCALES = {2: (0,), 6: (1, 4), 9: (1, 4, 7)}  # which of them multiply


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then the modulation; `scale` has its 1 already."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * scale + shift


class Heads(nn.Module):
    """Queries, keys and values of one stream."""

    path: HeadPath = "plain"  # of queries and keys

    def __init__(self, heads: int, qkv: Joined, norm_q: nn.Module | None, norm_k: nn.Module | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv: nn.Module = qkv
        self.norm_q, self.norm_k = norm_q, norm_k
        assert (norm_q is None) == (norm_k is None), "queries and keys are normed alike"
        assert all(norm is None or isinstance(norm, RMSNorm) for norm in (norm_q, norm_k)), "SD3.5 norms are RMS"

    def forward(self, x: Tensor, route: Route = ()) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> q, k, v (B, H, S, D / H)."""
        heads = project(self.qkv, x, route).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D / H)
        if self.path == "fused" and not torch.compiler.is_exporting():
            q, k, v = heads.unbind(2)
            q, k = normed_heads(q, k, (present(self.norm_q), present(self.norm_k)))
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        q = q if self.norm_q is None else rms(self.norm_q, q)
        return q, k if self.norm_k is None else rms(self.norm_k, k), v


def gathered(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Attention (B, S, D), heads side by side, of q, k, v (B, H, S, D / H)."""
    return attend(q, k, v, kv_len).transpose(1, 2).flatten(2)


class Feed(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.up, self.down = source.net[0].proj, source.net[2]

    def forward(self, x: Tensor, route: Route = ()) -> Tensor:
        return project(self.down, F.gelu(project(self.up, x, route), approximate="tanh"), route)


class JointBlock(nn.Module):
    """A `JointTransformerBlock` whose projections of one input are joined. Shares the original's parameters."""

    def __init__(self, source: JointTransformerBlock) -> None:
        super().__init__()
        one: Any = source.attn
        self.modulation: nn.Module = source.norm1.linear
        self.text_modulation: nn.Module = source.norm1_context.linear
        self.image = Heads(one.heads, Joined(one.to_q, one.to_k, one.to_v), one.norm_q, one.norm_k)
        added = Joined(one.add_q_proj, one.add_k_proj, one.add_v_proj)
        self.text = Heads(one.heads, added, one.norm_added_q, one.norm_added_k)
        self.out: nn.Module = one.to_out[0]
        self.feed = Feed(source.ff)
        self.last: bool = source.context_pre_only  # its text goes nowhere
        self.text_out: nn.Module | None = None if self.last else present(one.to_add_out)
        self.text_feed = None if self.last else Feed(source.ff_context)
        two: Any = source.attn2
        self.dual = (
            None if two is None else Heads(two.heads, Joined(two.to_q, two.to_k, two.to_v), two.norm_q, two.norm_k)
        )
        self.dual_out: nn.Module | None = None if two is None else two.to_out[0]

    @property
    def rows(self) -> tuple[int, int]:
        """Vectors of modulation for the image and for the text."""
        return IMAGE_ROWS if self.dual is None else DUAL_ROWS, LAST_ROWS if self.last else TEXT_ROWS

    def modulate(self, embedded: Tensor, route: Route) -> Tensor:
        """embedded (B, D), after its SiLU -> (B, rows, D), image first; scales with their 1."""
        made = zip((self.modulation, self.text_modulation), self.rows, strict=True)
        return torch.cat([_vectors(linear, embedded, count, route) for linear, count in made], dim=1)

    def forward(
        self, x: Tensor, text: Tensor, table: Tensor, route: Route = (), kv_len: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, D), text (B, L, D), table (B, rows, 1, D); `kv_len` (B,) of the joint attention's S + L tokens."""
        image_rows, text_rows = table.split(self.rows, dim=1)
        shift, scale, gate, shift_f, scale_f, gate_f, *dual = image_rows.unbind(1)  # (B, 1, D) each
        first, *rest = text_rows.unbind(1)
        text_scale, text_shift = (first, rest[0]) if self.last else (rest[0], first)
        streams = self.image(normed(x, shift, scale), route), self.text(normed(text, text_shift, text_scale), route)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams, strict=True))
        joint = gathered(q, k, v, kv_len)  # (B, S + L, D)
        following = x + gate * project(self.out, joint[:, : x.shape[1]].contiguous(), route)
        if self.dual is not None:
            own = gathered(*self.dual(normed(x, dual[0], dual[1]), route))
            following = following + dual[2] * project(present(self.dual_out), own, route)
        following = following + gate_f * self.feed(normed(following, shift_f, scale_f), route)
        if not self.last:
            _, gate_a, shift_f, scale_f, gate_f = rest
            text = text + gate_a * project(present(self.text_out), joint[:, x.shape[1] :].contiguous(), route)
            text = text + gate_f * present(self.text_feed)(normed(text, shift_f, scale_f), route)
        return following, text


def _vectors(linear: nn.Module, embedded: Tensor, count: int, route: Route) -> Tensor:
    """(B, count, D)."""
    rows = list(project(linear, embedded, route).unflatten(-1, (count, -1)).unbind(1))
    for index in SCALES[count]:
        rows[index] = 1.0 + rows[index]
    return torch.stack(rows, dim=1)


class SD3Denoiser(nn.Module):
    """Dense SD3 denoiser over the parameters of `transformer` (shared, not copied); returns v = noise - clean."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.channels: int = transformer.config["in_channels"]
        self.patch: int = transformer.config["patch_size"]
        self.embed_image = transformer.pos_embed
        self.embed_text: nn.Module = transformer.context_embedder
        self.time = transformer.time_text_embed
        self.blocks = nn.ModuleList(
            JointBlock(cast(JointTransformerBlock, block)) for block in transformer.transformer_blocks
        )
        self.last_modulation: nn.Module = transformer.norm_out.linear
        self.out: nn.Module = transformer.proj_out
        named_as(self, transformer)

    def pack(self) -> SD3Denoiser:
        """Join projections into single matrices for inference; the result no longer trains. Returns self."""
        pack_all(self)
        return self

    def use_kernels(self) -> SD3Denoiser:
        """Calls kernels where they are chosen for the device and type that it has now. Returns self.

        Raises BackendUnavailable where an explicit choice cannot run.
        """
        for heads in self.modules():
            if isinstance(heads, Heads) and heads.norm_q is not None:
                heads.path = norm_path(heads.norm_q)
        return self

    def share(self, names: Mapping[nn.Module, str], wanted: Collection[str]) -> dict[str, Routed]:
        """Makes the `wanted` linears ready for several versions (`tdm_serve.models.joined.share`)."""
        return share(self, names, wanted, (*self.time.modules(), *self.embed_image.modules()))

    def refine_text(self, text: Tensor, pooled: Tensor, route: Route = ()) -> Tensor:
        """Text features (B, L, C) and pooled ones (B, P) -> (B, L + 1, D)."""
        return torch.cat((project(self.embed_text, text, route), self.time.text_embedder(pooled).unsqueeze(1)), dim=1)

    def modulation(self, time: Tensor, text: Tensor, route: Route = ()) -> Tensor:
        """All that the blocks take from `time` (B,), up to 1000, and pooled text: (B, M, D). text as `forward`'s."""
        pooled = text[:, -1]
        times = self.time.time_proj(time).to(pooled.dtype)
        embedded = F.silu(self.time.timestep_embedder(times) + pooled)
        rows = [cast(JointBlock, block).modulate(embedded, route) for block in self.blocks]
        return torch.cat((*rows, _vectors(self.last_modulation, embedded, LAST_ROWS, route)), dim=1)

    def forward(
        self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W), given `modulation` (B, M, D) and refined `text` (B, L + 1, D).

        `lengths` (B,) int32 are the rows' text tokens where they differ; what is between them and the last row, the
        pooled embedding, is ignored.
        """
        height, width = latents.shape[-2] // self.patch, latents.shape[-1] // self.patch
        x, words = self._embed(latents), text[:, :-1]
        table, row = modulation.unsqueeze(2), 0  # (B, M, 1, D)
        kv_len = None if lengths is None else lengths + height * width
        for block in self.blocks:
            count = sum(cast(JointBlock, block).rows)
            x, words = block(x, words, table[:, row : row + count], route, kv_len)
            row += count
        x = project(self.out, normed(x, table[:, row + 1], table[:, row]), route)  # (B, S, patch * patch * C)
        x = x.unflatten(1, (height, width)).unflatten(-1, (self.patch, self.patch, -1))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, *latents.shape[-2:])

    def _embed(self, latents: Tensor) -> Tensor:
        """Patches of latents (B, C, H, W) as tokens (B, S, D) with their positions."""
        patches = latents.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))  # (B, C, h, p, w, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, S, C * p * q)
        linear = self.embed_image.proj  # strides are patches, so the convolution is a product
        x = F.linear(patches, linear.weight.flatten(1), linear.bias)
        height, width = latents.shape[-2] // self.patch, latents.shape[-1] // self.patch
        x = x.unflatten(1, (height, width)) + self._positions(height, width)
        return x.flatten(1, 2).to(latents.dtype)

    def _positions(self, height: int, width: int) -> Tensor:
        """The middle (1, height, width, D) of the position table, as a view."""
        side = cast(int, self.embed_image.pos_embed_max_size)
        top, left = (side - height) // 2, (side - width) // 2
        whole = cast(Tensor, self.embed_image.pos_embed).unflatten(1, (side, side))  # (1, side, side, D)
        return whole[:, top : top + height, left : left + width]
