"""The micro world's network: a diffusion transformer on 4 x 4 patches of pixels, conditioned through its modulation.

The prompt's words, each in its place, are mixed into one vector that is added to the embedded noise level; it scales,
shifts and gates every block (DiT's adaLN-zero). Words as tokens beside the 16 patches were tried: they learned a third
faster per step, but a step cost 1.6 times as much, so they lost for the same seconds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_finetune.micro.world import COLOURS, SIZE

PATCH = 4
CHANNELS = 3
WORDS = (
    *("a", "and", "square", "squares", "one", "two", "three", "four"),
    *COLOURS,
    *("left", "right", "of", "above", "below"),
)  # token 0 is none of them
LENGTH = 8  # words of the longest prompt
WORD_WIDTH = 32
FREQUENCIES = 32


class Block(nn.Module):
    """Attention and feed-forward; the identity until trained."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.to_v, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, T, D), condition (B, D)."""
        scale, shift, gate, scale_up, shift_up, gate_down = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        x = x + gate * self.attend(modulated(x, scale, shift))
        return x + gate_down * self.down(F.gelu(self.up(modulated(x, scale_up, shift_up))))

    def attend(self, x: Tensor) -> Tensor:
        """Every patch to every patch.

        Written out, because torch's fused attention is made for long sequences: for 16 patches on a CPU its backward
        pass alone took a third of a training step.
        """
        split = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (to(x).unflatten(-1, split).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        weights = (q * split[1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class MicroNet(nn.Module):
    """forward(latents (B, 3, 16, 16), level (B,), tokens (B, LENGTH), lengths (B,)) -> output like the latents.

    Latents are pixels in [-1, 1]. `top_level` is what the process calls pure noise: 1 for flow matching, 1000 for
    diffusion. Length 0 is the unconditional prompt.
    """

    frequencies: Tensor

    def __init__(self, width: int, layers: int, heads: int, top_level: float) -> None:
        super().__init__()
        self.top_level = top_level
        pixels = CHANNELS * PATCH**2
        self.patches = nn.Linear(pixels, width)
        self.places = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, width))
        waves = 2 * math.pi * torch.logspace(0, 3, FREQUENCIES)
        self.register_buffer("frequencies", waves, persistent=False)
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Embedding(len(WORDS) + 1, WORD_WIDTH)
        self.text = nn.Sequential(nn.Linear(LENGTH * WORD_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.output = zeroed(nn.Linear(width, pixels))

    def forward(self, latents: Tensor, level: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        condition = self.condition(level, tokens, lengths)
        x = F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)  # (B, 16, 48)
        x = self.patches(x) + self.places
        for block in self.blocks:
            x = block(x, condition)
        scale, shift = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        x = self.output(modulated(x, scale, shift)).transpose(1, 2)  # (B, 48, 16)
        return F.pixel_shuffle(x.unflatten(2, (SIZE // PATCH, SIZE // PATCH)), PATCH)

    def condition(self, level: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Noise level and prompt as one vector (B, D); tokens beyond a prompt's length do not count."""
        angles = (level / self.top_level).unsqueeze(1) * self.frequencies
        said = torch.arange(LENGTH, device=tokens.device) < lengths.unsqueeze(1)
        words = self.words(tokens) * said.unsqueeze(2)
        embedded = self.level(torch.cat([angles.sin(), angles.cos()], 1)) + self.text(words.flatten(1))
        return F.silu(embedded)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift per picture."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def zeroed(linear: nn.Linear) -> nn.Linear:
    """The same linear, all weights zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
