"""The Z-Image family: prompt -> conditioning, latents -> velocity, latents -> picture.

Every prompt is encoded alone at one fixed padded length, modulation rows are computed one noise level at a time, and a
CPU decodes one picture at a time: those are the places where its results would otherwise depend on the size of the
batch. The autoencoder runs in channels-last layout, the faster one for its convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Model

from tdm_serve.errors import PromptTooLong
from tdm_serve.models.adapters import fuse_lora
from tdm_serve.models.autoencoder import decode
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser, padded_length
from tdm_serve.models.spec import ModelSpec

KEPT_LEVELS = 256  # noise levels whose modulation is kept; requests choose their step count, so levels have no bound

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A prompt, ready for the denoiser: refined text tokens (1, L, D), L a multiple of 32."""

    text: Tensor


class ZImage:
    """A loaded Z-Image checkpoint. `denoiser` is what a backend replaces; the rest is the same for all backends."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(spec.base / "tokenizer")
        self.tokens("")  # clears the padding that a tokenizer's file may ask for, before threads share it
        self.text_encoder = placed(_load_text_encoder(spec.base / "text_encoder", dtype), device)
        self.vae = placed(AutoencoderKL.from_pretrained(spec.base / "vae", dtype=dtype), device)
        # torch documents memory_format but declares no overload with it
        nn.Module.to(self.vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.scale = float(self.vae.config["scaling_factor"])
        self.shift = float(self.vae.config["shift_factor"])
        self.factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        self.denoiser = ZImageDenoiser(load_transformer(spec)).pack().to(device, dtype)
        self.channels = self.denoiser.channels
        self._modulation: dict[float, Tensor] = {}

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt in its chat template. Safe from any thread.

        Never padded by the tokenizer, which would remember it: a check in one thread would change what another encodes.
        """
        return self.tokenizer(self._templated(prompt), verbose=False)["input_ids"]

    def check_prompt(self, prompt: str) -> None:
        """Raises PromptTooLong instead of cutting."""
        tokens, limit = len(self.tokens(prompt)), self.spec.max_prompt_tokens
        if tokens > limit:
            raise PromptTooLong(
                f"the prompt has {tokens} tokens, template included; this checkpoint reads at most {limit}",
                param="prompt",
            )

    def _templated(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def condition(self, prompt: str, length: int = 0) -> Conditioning:
        """Encodes one prompt, padded to at least `length` tokens; the empty one is the unconditional of guidance."""
        tokens, limit = self.tokens(prompt), padded_length(self.spec.max_prompt_tokens)
        padding = [self.tokenizer.pad_token_id] * (limit - len(tokens))
        ids = torch.tensor([tokens + padding], device=self.device)  # (1, limit)
        count = torch.tensor([len(tokens)], device=self.device)
        mask = (torch.arange(limit, device=self.device) < count).long().unsqueeze(0)
        features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return Conditioning(self.denoiser.refine_text(features[:, : max(length, padded_length(len(tokens)))], count))

    def modulation(self, sigma: float) -> Tensor:
        """The denoiser's time-dependent rows (1, M, D) at one noise level; the latest levels are kept."""
        if sigma not in self._modulation:
            if len(self._modulation) == KEPT_LEVELS:
                del self._modulation[next(iter(self._modulation))]
            level = torch.tensor([sigma], dtype=torch.float32, device=self.device)
            self._modulation[sigma] = self.denoiser.modulation(level)
        return self._modulation[sigma]

    def noise(self, seed: int, width: int, height: int) -> Tensor:
        """A seed's initial latents (1, C, H / 8, W / 8): what diffusers draws on the CPU in float32."""
        shape = (1, self.channels, height // self.factor, width // self.factor)
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """uint8 pictures (B, H, W, 3) on the CPU, of clean latents (1, C, h, w) each."""
        batch = torch.cat(list(latents)).contiguous(memory_format=torch.channels_last)
        raw = batch.to(self.dtype) / self.scale + self.shift
        parts = raw.split(1 if self.device.type == "cpu" else len(raw))
        decoded = torch.cat([decode(self.vae, part) for part in parts]).float()
        # the steps of diffusers' image processor, so that rounding agrees
        pictures = (decoded * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pictures.permute(0, 2, 3, 1).cpu()


def load_transformer(spec: ModelSpec) -> ZImageTransformer2DModel:
    """The base transformer in float32, with the version's adapter fused where it has one."""
    transformer = ZImageTransformer2DModel.from_pretrained(spec.base / "transformer", dtype=torch.float32)
    if spec.adapter is not None:
        fuse_lora(transformer, spec.adapter)
    return transformer.eval().requires_grad_(False)


def _load_text_encoder(folder: Path, dtype: torch.dtype) -> Qwen3Model:
    """Without its last layer and final norm: conditioning is the second to last hidden state."""
    encoder = Qwen3Model.from_pretrained(folder, dtype=dtype)  # and rotary frequencies in float32, unlike `to(dtype)`
    encoder.layers = encoder.layers[:-1]
    encoder.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue] - a norm to transformers' own code
    return encoder


def placed(module: M, device: torch.device) -> M:
    """On its device, for inference. Generic: diffusers' and transformers' own `to` are declared without parameters."""
    return module.to(device).eval().requires_grad_(False)
