"""Z-Image's transformer as one batched function: fixed shapes, no per-sample lists, tables instead of repeated work.

`diffusers.ZImageTransformer2DModel` takes lists of pictures, rebuilds position ids on every call and runs the text
refiner and all the time projections again on every step. At four evaluations per picture that overhead shows. This
module runs the same weights on dense tensors:

* the text refiner depends on the prompt only, so it runs once per prompt (`refine_text`);
* everything computed from the time alone depends on sigma only, so it is one row per noise level (`modulation`),
  computed row by row so that a row never depends on which other rows are in the batch;
* rotary tables are kept per axis (`zimage_rope`).

Token order is diffusers': image tokens, image padding to a multiple of 32, text tokens, text padding to a multiple of
32. Padding tokens are learned and attended, as in the original. Captions of several padded lengths share a forward:
what fills the shorter ones up comes last and is attended by nobody, and a row's image follows its own caption in the
rotary tables, so every row is as alone. The state dict has the keys of diffusers' class, packed or not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZImageTransformer2DModel,
    ZImageTransformerBlock,
)
from torch import Tensor, nn

from tdm_serve.models.families.attention import attend, attend_normed
from tdm_serve.models.families.zimage_rope import Rope, Tables
from tdm_serve.models.joined import Joined, pack_all, present, rms, share
from tdm_serve.models.kernel_choice import HeadPath, attention_path, norm_path
from tdm_serve.models.naming import named_as
from tdm_serve.models.routed import Route, Routed, project

TEXT_MULTIPLE: int = SEQ_MULTI_OF
PATCH = 2  # both published and embedded Z-Image checkpoints use 2x2 latent patches and one frame
PATCH_KEY = f"{PATCH}-1"


def padded_length(tokens: int) -> int:
    """Tokens after padding to the multiple of 32 that Z-Image attends over."""
    return -(-tokens // TEXT_MULTIPLE) * TEXT_MULTIPLE


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs. x (B, S, H, D); cos, sin (S, 1, D / 2) or (B, S, 1, D / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, H, D / 2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class Block(nn.Module):
    """A `ZImageTransformerBlock` whose projections of one input are joined. Shares the original's parameters."""

    path: HeadPath = "plain"  # of queries and keys, and of attention

    def __init__(self, source: ZImageTransformerBlock) -> None:
        super().__init__()
        attention, feed_forward = source.attention, source.feed_forward
        self.heads: int = attention.heads
        self.qkv: nn.Module = Joined(attention.to_q, present(attention.to_k), present(attention.to_v))
        self.norm_q, self.norm_k = present(attention.norm_q), present(attention.norm_k)
        self.out = present(attention.to_out)[0]
        self.gate_up: nn.Module = Joined(feed_forward.w1, feed_forward.w3)
        self.down = feed_forward.w2
        self.norms = nn.ModuleList((source.attention_norm1, source.attention_norm2, source.ffn_norm1, source.ffn_norm2))
        self.modulation: nn.Module | None = source.adaLN_modulation if source.modulation else None

    def attend(self, x: Tensor, rope: Tables, route: Route, kv_len: Tensor | None) -> Tensor:
        """Full attention over x (B, S, D), or over the first `kv_len` (B,) tokens of each row."""
        q, k, v = project(self.qkv, x, route).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, S, H, D / H)
        if self.path == "plain" or torch.compiler.is_exporting():
            q, k = rotate(rms(self.norm_q, q), *rope), rotate(rms(self.norm_k, k), *rope)
            y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), kv_len)
        else:
            y = attend_normed(q, k, v, (self.norm_q, self.norm_k), rope, kv_len, self.path)
        return project(self.out, y.transpose(1, 2).flatten(2), route)

    def feed(self, x: Tensor, route: Route = ()) -> Tensor:
        gate, up = project(self.gate_up, x, route).chunk(2, dim=-1)
        return project(self.down, F.silu(gate) * up, route)

    def forward(
        self,
        x: Tensor,
        rope: Tables,
        modulation: Tensor | None = None,
        route: Route = (),
        kv_len: Tensor | None = None,
    ) -> Tensor:
        """x (B, S, D); modulation (B, 4, 1, D) holds scale, gate, scale, gate with tanh and 1 + already applied."""
        norm1, norm2, norm3, norm4 = self.norms
        if modulation is None:
            x = x + rms(norm2, self.attend(rms(norm1, x), rope, route, kv_len))
            return x + rms(norm4, self.feed(rms(norm3, x), route))
        scale_a, gate_a, scale_f, gate_f = modulation.unbind(1)  # (B, 1, D) each
        x = x + gate_a * rms(norm2, self.attend(rms(norm1, x) * scale_a, rope, route, kv_len))
        return x + gate_f * rms(norm4, self.feed(rms(norm3, x) * scale_f, route))


def blocks_of(sources: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(Block(cast(ZImageTransformerBlock, source)) for source in sources)


class ZImageDenoiser(nn.Module):
    """Dense Z-Image denoiser over the parameters of `transformer` (shared, not copied).

    Velocity convention of flow matching, v = noise - clean: diffusers' transformer returns the negative, this does not.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.channels: int = transformer.in_channels
        self.time = transformer.t_embedder
        self.time_scale: float = transformer.config["t_scale"]
        self.embed_image = transformer.all_x_embedder[PATCH_KEY]
        self.embed_text = transformer.cap_embedder
        self.image_pad, self.text_pad = transformer.x_pad_token, transformer.cap_pad_token
        self.image_blocks = blocks_of(transformer.noise_refiner)
        self.text_blocks = blocks_of(transformer.context_refiner)
        self.blocks = blocks_of(transformer.layers)
        self.final = transformer.all_final_layer[PATCH_KEY]
        self.rope = Rope(transformer.rope_embedder)
        named_as(self, transformer)

    def pack(self) -> ZImageDenoiser:
        """Join projections into single matrices for inference; the result no longer trains. Returns self."""
        pack_all(self)
        return self

    def use_kernels(self) -> ZImageDenoiser:
        """Calls kernels where they are chosen for the device and type that it has now. Returns self.

        Text is refined once per prompt, so there is nothing to gain by quantising that. Raises BackendUnavailable.
        """
        parts = ((self.text_blocks, norm_path), (self.image_blocks, attention_path), (self.blocks, attention_path))
        for blocks, path in parts:
            for block in cast(Iterable[Block], blocks):
                block.path = path(block.norm_q)
        return self

    def share(self, names: Mapping[nn.Module, str], wanted: Collection[str]) -> dict[str, Routed]:
        """Makes the `wanted` linears ready for several versions; returns them by name. Comes before `pack`.

        `names` are those of the transformer's modules, which adapters use. Linears of the time embedding, which no
        route reaches, are not among the result, nor are names that do not exist.
        """
        return share(self, names, wanted, self.time.modules())

    def modulation(self, sigma: Tensor, route: Route = ()) -> Tensor:
        """Everything the blocks take from the time. sigma (B,) in [0, 1] -> (B, 4 * blocks + 1, D)."""
        clean_time = (1.0 - sigma) * self.time_scale  # Z-Image counts time towards the clean end
        time = self.time(clean_time)  # (B, min(D, 256))
        rows = [self._block_modulation(cast(Block, b), time, route) for b in (*self.image_blocks, *self.blocks)]
        rows.append(1.0 + project(cast(nn.Module, self.final.adaLN_modulation), time, route).unsqueeze(1))
        return torch.cat(rows, dim=1)

    @staticmethod
    def _block_modulation(block: Block, time: Tensor, route: Route) -> Tensor:
        assert block.modulation is not None
        scale_a, gate_a, scale_f, gate_f = project(block.modulation, time, route).unflatten(-1, (4, -1)).unbind(1)
        return torch.stack((1.0 + scale_a, gate_a.tanh(), 1.0 + scale_f, gate_f.tanh()), dim=1)

    def refine_text(self, text: Tensor, lengths: Tensor, route: Route = (), padded: Tensor | None = None) -> Tensor:
        """Text features (B, L, C) with `lengths` (B,) valid tokens -> refined tokens (B, L, D); L a multiple of 32.

        Learned tokens fill a row up to L, or up to its own `padded` (B,) int32 length; what is behind is not attended.
        """
        x = project(self.embed_text, text, route)
        padding = torch.arange(text.shape[1], device=text.device) >= lengths.unsqueeze(1)
        x = torch.where(padding.unsqueeze(-1), self.text_pad.to(x.dtype), x)
        rope = self.rope.text(text.shape[1])
        for block in self.text_blocks:
            x = block(x, rope, None, route, padded)
        return x

    def forward(
        self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W), given `modulation` (B, M, D) and refined `text` (B, L, D).

        `lengths` (B,) int32 are the rows' padded caption lengths where they differ; the text behind them is ignored.
        """
        height, width = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        tokens = height * width
        x = self._embed(latents, route)
        image = x.shape[1]
        rope = self.rope.joint(text.shape[1], height, width, image - tokens, lengths)
        of_image = rope[0][..., :image, :, :], rope[1][..., :image, :, :]
        table = modulation.unsqueeze(2)  # (B, M, 1, D)
        row = 0
        for block in self.image_blocks:
            x = block(x, of_image, table[:, row : row + 4], route)
            row += 4
        x = torch.cat((x, text.to(x.dtype)), dim=1)
        kv_len = None if lengths is None else lengths + image
        for block in self.blocks:
            x = block(x, rope, table[:, row : row + 4], route, kv_len)
            row += 4
        x = F.layer_norm(x[:, :tokens], (x.shape[-1],), eps=1e-6) * table[:, row]
        x = project(cast(nn.Module, self.final.linear), x, route)  # (B, tokens, PATCH * PATCH * C)
        x = x.unflatten(1, (height, width)).unflatten(-1, (PATCH, PATCH, self.channels))
        return -x.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)

    def _embed(self, latents: Tensor, route: Route) -> Tensor:
        """Patches of latents (B, C, H, W) as tokens (B, S, D), padded with the learned token to a multiple of 32."""
        patches = latents.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # (B, C, h, p, w, q)
        x = project(self.embed_image, patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), route)
        missing = padded_length(x.shape[1]) - x.shape[1]
        if missing:
            x = torch.cat((x, self.image_pad.to(x.dtype).expand(len(x), missing, -1)), dim=1)
        return x
