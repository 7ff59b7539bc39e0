"""The Z-Image family: prompt -> conditioning, latents -> velocity, latents -> picture.

Every prompt is encoded alone at one fixed padded length, modulation rows are computed one noise level at a time, and
pictures are decoded one at a time: those are the places where results would otherwise depend on the size of the batch.
Callers may ask for prompts or pictures `together`. The autoencoder runs in channels-last layout, the faster one for its
convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Model

from tdm_serve.errors import PictureFailed, PromptTooLong
from tdm_serve.models.adapters import fuse_adapters, read_adapters
from tdm_serve.models.autoencoder import decode, posterior
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser, padded_length
from tdm_serve.models.lora import base_of
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters, Versions
from tdm_serve.preview import Matrix, colour_blocks, fit

KEPT_LEVELS = 256  # noise levels whose modulation is kept; requests choose their step count, so levels have no bound
KEPT_PROMPTS = 1024  # prompts whose token ids are kept: a request's are wanted by its check and again by its start
LONG_PROMPT = 4096  # characters; longer ones are refused after one look, and not worth keeping

M = TypeVar("M", bound=nn.Module)


class ZImage:
    """A loaded Z-Image base with one or more versions. `denoiser` is what a backend replaces.

    With one version its adapter is added to the base weights; several share the base (`tdm_serve.models.routed`).
    """

    def __init__(
        self, specs: Sequence[ModelSpec], device: torch.device, dtype: torch.dtype, adapters: Adapters = "fused"
    ) -> None:
        spec = specs[0]
        self.spec, self.device, self.dtype = spec, device, dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(spec.base / "tokenizer")
        self._tokens = lru_cache(KEPT_PROMPTS)(self._tokenised)
        self.tokens("")  # clears the padding that a tokenizer's file may ask for, before threads share it
        self.text_encoder = placed(_load_text_encoder(spec.base / "text_encoder", dtype), device)
        self.vae = placed(AutoencoderKL.from_pretrained(spec.base / "vae", dtype=dtype), device)
        # torch documents memory_format but declares no overload with it
        nn.Module.to(self.vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.scale = float(self.vae.config["scaling_factor"])
        self.shift = float(self.vae.config["shift_factor"])
        self.factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        self.denoiser, self.versions = _denoiser(specs, device, dtype, adapters)
        self.channels = self.denoiser.channels
        self.preview = spec.preview or self._fit_preview()
        self._modulation: dict[tuple[float, str], Tensor] = {}

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt in its chat template. Safe from any thread."""
        return list(self._tokens(prompt) if len(prompt) <= LONG_PROMPT else self._tokenised(prompt))

    def _tokenised(self, prompt: str) -> tuple[int, ...]:
        """Never padded by the tokenizer, which would remember it: a check in one thread would change another's text."""
        return tuple(self.tokenizer(self._templated(prompt), verbose=False)["input_ids"])

    def check_prompt(self, prompt: str, param: str = "prompt") -> int:
        """The padded length of a prompt that can be read. Raises PromptTooLong instead of cutting."""
        tokens, limit = len(self.tokens(prompt)), self.spec.max_prompt_tokens
        if tokens > limit:
            raise PromptTooLong(
                f"the {param.replace('_', ' ')} has {tokens} tokens, template included; this checkpoint reads at most "
                f"{limit}",
                param=param,
            )
        return padded_length(tokens)

    def _templated(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def encode(self, prompts: Sequence[Sequence[int]], *, together: bool = False) -> list[Tensor]:
        """Text features (tokens, C) of prompts as token ids, for every version alike."""
        limit, pad = padded_length(self.spec.max_prompt_tokens), self.tokenizer.pad_token_id
        ids = torch.tensor([[*prompt, *[pad] * (limit - len(prompt))] for prompt in prompts], device=self.device)
        counts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = (torch.arange(limit, device=self.device) < counts.unsqueeze(1)).long()
        size = len(prompts) if together else 1
        parts = zip(ids.split(size), mask.split(size), strict=True)  # (size, limit) each
        features = [self.text_encoder(input_ids=i, attention_mask=m).last_hidden_state for i, m in parts]
        return [row[: len(prompt)].clone() for row, prompt in zip(chain(*features), prompts, strict=True)]

    def refine(self, features: Tensor, length: int, version: str = "") -> Tensor:
        """Text tokens (1, length, D) ready for the denoiser, of features (tokens, C); length is a multiple of 32."""
        count = torch.tensor([len(features)], device=self.device)
        padded = F.pad(features, (0, 0, 0, length - len(features))).unsqueeze(
            0
        )  # padding is replaced by learned tokens
        return self.denoiser.refine_text(padded, count, ((version, 1),))

    def condition(self, prompt: str, length: int = 0, version: str = "") -> Tensor:
        """A prompt from scratch, padded to at least `length` tokens: (1, L, D)."""
        tokens = self.tokens(prompt)
        return self.refine(self.encode([tokens])[0], max(length, padded_length(len(tokens))), version)

    def modulation(self, sigma: float, version: str = "") -> Tensor:
        """The denoiser's time-dependent rows (1, M, D) at one noise level; the latest levels are kept."""
        key = (sigma, version)
        if key not in self._modulation:
            if len(self._modulation) == KEPT_LEVELS:
                del self._modulation[next(iter(self._modulation))]
            level = torch.tensor([sigma], dtype=torch.float32, device=self.device)
            self._modulation[key] = self.denoiser.modulation(level, ((version, 1),))
        return self._modulation[key]

    def noise(self, seed: int, width: int, height: int) -> Tensor:
        """A seed's initial latents (1, C, H / 8, W / 8): what diffusers draws on the CPU in float32."""
        shape = (1, self.channels, height // self.factor, width // self.factor)
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device)

    def decode(self, latents: Sequence[Tensor], *, together: bool = False) -> Tensor:
        """uint8 pictures (B, H, W, 3) on the CPU, of clean latents (1, C, h, w) each. Raises PictureFailed."""
        batch = torch.cat(list(latents)).contiguous(memory_format=torch.channels_last)
        raw = batch.to(self.dtype) / self.scale + self.shift
        decoded = torch.cat([decode(self.vae, part) for part in raw.split(len(raw) if together else 1)]).float()
        if not bool(decoded.isfinite().all()):
            raise PictureFailed("the autoencoder decoded latents to pixels that are no numbers")
        # the steps of diffusers' image processor, so that rounding agrees
        pictures = (decoded * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pictures.permute(0, 2, 3, 1).cpu()

    @torch.inference_mode()
    def _fit_preview(self) -> Matrix:
        """For a checkpoint that brings no matrix of its own."""
        pictures = colour_blocks()
        sent = (pictures / 127.5 - 1.0).to(self.device, self.dtype)
        latents = torch.cat([posterior(self.vae, picture).mean for picture in sent.split(1)])
        return fit((latents.float() - self.shift) * self.scale, pictures.to(self.device))


def _denoiser(
    specs: Sequence[ModelSpec], device: torch.device, dtype: torch.dtype, adapters: Adapters
) -> tuple[ZImageDenoiser, Versions]:
    """The base for all versions, or a single version with its adapter in the base weights."""
    transformer = load_transformer(specs[0]) if len(specs) == 1 else _base_transformer(specs[0])
    base = base_of(transformer, str(specs[0].base))
    denoiser = ZImageDenoiser(transformer)
    if len(specs) == 1:
        return denoiser.pack().to(device, dtype), Versions(base, {}, {specs[0].id: ()}, adapters)
    versions = {spec.id: spec.adapters for spec in specs}
    loras = (read_adapters(own, base) for own in versions.values())
    wanted = {name for lora in loras if lora is not None for name in lora.modules}
    shared = denoiser.share({module: name for name, module in transformer.named_modules()}, wanted)
    return denoiser.pack().to(device, dtype), Versions(base, shared, versions, adapters)


def load_transformer(spec: ModelSpec) -> ZImageTransformer2DModel:
    """The base transformer in float32, with the version's adapters fused where it has any."""
    transformer = _base_transformer(spec)
    fuse_adapters(transformer, spec.adapters, str(spec.base))
    return transformer


def _base_transformer(spec: ModelSpec) -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel.from_pretrained(spec.base / "transformer", dtype=torch.float32)
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
