"""The Z-Image family: prompt -> conditioning, latents -> velocity, latents -> picture.

Every prompt is encoded alone at one fixed padded length, and modulation rows are computed one noise level at a time:
those are the places where results would otherwise depend on the size of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Model

from tdm_serve.errors import CheckpointError
from tdm_serve.models.adapters import fuse_adapters
from tdm_serve.models.families.attention import ragged
from tdm_serve.models.families.base import Family, too_long, with_versions
from tdm_serve.models.families.zimage_denoiser import PATCH, TEXT_MULTIPLE, ZImageDenoiser, padded_length
from tdm_serve.models.routed import BASE, Variant
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters
from tdm_serve.sampling import Row

KEPT_LEVELS = 128  # noise levels whose modulation is kept, 1 MB each at full size; requests may choose their step count
KEPT_PROMPTS = 1024  # prompts whose token ids are kept: a request's are wanted by its check and again by its start
SHARE = 16  # a text may be filled up by this part of the picture's tokens, to share forwards with longer ones
LONG_PROMPT = 4096  # characters; longer ones are refused after one look, and not worth keeping


class ZImage(Family):
    """A loaded Z-Image base with one or more versions."""

    denoiser: ZImageDenoiser
    patch = PATCH
    quantisable = True

    def load_tokenizer(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.spec.base / "tokenizer")
        self._tokens = lru_cache(KEPT_PROMPTS)(self._tokenised)
        self.tokens("")  # clears the padding that a tokenizer's file may ask for, before threads share it

    def load_text(self) -> None:
        self.load_tokenizer()
        self.text_encoder = _shortened(self.encoder(Qwen3Model, "text_encoder"))

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        transformer = self.placement.network(ZImageTransformer2DModel, self.spec.base / "transformer")
        denoiser = ZImageDenoiser(transformer)
        places, rows, columns = denoiser.rope.limits
        if (tokens := padded_length(self.spec.max_prompt_tokens)) > places:
            raise CheckpointError(f"{self.spec.base} is to read {tokens} tokens; its transformer has {places} places")
        self.longest = min(rows, columns) * PATCH
        self.versions = with_versions(denoiser, transformer, specs, adapters)
        del transformer  # or the weights would stay behind where they were
        self.denoiser = self.ready(denoiser.pack()).use_kernels()
        self.channels = self.denoiser.channels
        self.start_modulation()

    def start_modulation(self) -> None:
        """Nothing of the time's rows is kept yet."""
        self._modulation: dict[tuple[float, Variant], Tensor] = {}

    def tokens(self, prompt: str, truncate: bool = False) -> list[int]:
        """Token ids of a prompt in its chat template, of which stock cuts the end. Safe from any thread."""
        ids = self._tokens(prompt) if len(prompt) <= LONG_PROMPT else self._tokenised(prompt)
        return list(ids[: self.spec.max_prompt_tokens] if truncate else ids)

    def _tokenised(self, prompt: str) -> tuple[int, ...]:
        """Never padded by the tokenizer, which would remember it: a check in one thread would change another's text."""
        return tuple(self.tokenizer(self._templated(prompt), verbose=False)["input_ids"])

    def count(self, prompt: str) -> int:
        return len(self.tokens(prompt))

    def check_prompt(self, prompt: str, param: str = "prompt", truncate: bool = False) -> int:
        count, limit = len(self.tokens(prompt, truncate)), self.spec.max_prompt_tokens
        if count > limit:
            raise too_long(param, f"{count} tokens, template included, and this checkpoint reads at most {limit}")
        return padded_length(count)

    def _templated(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def encode(self, prompts: Sequence[Sequence[int]], *, together: bool = False) -> list[Tensor]:
        """Text features (tokens, C) of prompts as token ids, for every version alike."""
        limit, pad = padded_length(self.spec.max_prompt_tokens), self.tokenizer.pad_token_id
        ids = torch.tensor([[*prompt, *[pad] * (limit - len(prompt))] for prompt in prompts], device=self.text_device)
        counts = torch.tensor([len(prompt) for prompt in prompts], device=self.text_device)
        mask = (torch.arange(limit, device=self.text_device) < counts.unsqueeze(1)).long()
        size = len(prompts) if together else 1
        parts = zip(ids.split(size), mask.split(size), strict=True)  # (size, limit) each
        features = [self.text_encoder(input_ids=i, attention_mask=m).last_hidden_state for i, m in parts]
        texts = zip(chain(*features), prompts, strict=True)
        return [row[: len(prompt)].to(self.device, copy=True) for row, prompt in texts]

    def refine(self, features: Tensor, length: int, version: Variant = BASE) -> Tensor:
        """Text tokens (1, length, D) ready for the denoiser, of features (tokens, C); length is a multiple of 32."""
        count = torch.tensor([len(features)], device=self.device)
        padded = F.pad(features, (0, 0, 0, length - len(features))).unsqueeze(0)  # learned tokens replace the zeros
        return self.denoiser.refine_text(padded, count, ((version, 1),))

    def shared_length(self, length: int, width: int, height: int) -> int:
        """Multiples of 256 at 1024x1024, which has 4096 tokens, and of 64 at 512x512.

        So many prompts meet, and filling up those that are shorter adds at most one token in 16 of the picture's.
        """
        side, unit = self.factor * PATCH, TEXT_MULTIPLE
        while unit * 2 * SHARE <= (width // side) * (height // side):
            unit *= 2
        return min(padded_length(self.spec.max_prompt_tokens), -(-length // unit) * unit)

    def joined(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        return ragged(texts, [text.shape[1] for text in texts])

    def condition(self, prompt: str, length: int = 0, version: Variant = BASE) -> Tensor:
        """A prompt from scratch, padded to at least `length` tokens: (1, L, D)."""
        tokens = self.tokens(prompt)
        return self.refine(self.encode([tokens])[0], max(length, padded_length(len(tokens))), version)

    def timed(self, row: Row, text: Tensor, version: Variant = BASE) -> Tensor:  # noqa: ARG002 - needs the time alone
        return self.modulation(row.sigma, version)

    def modulation(self, sigma: float, version: Variant = BASE) -> Tensor:
        """The denoiser's time-dependent rows (1, M, D) at one noise level; the latest levels are kept."""
        key = (sigma, version)
        if key not in self._modulation:
            if len(self._modulation) == KEPT_LEVELS:
                del self._modulation[next(iter(self._modulation))]
            level = torch.tensor([sigma], dtype=torch.float32, device=self.device)
            self._modulation[key] = self.denoiser.modulation(level, ((version, 1),))
        return self._modulation[key]


def load_transformer(spec: ModelSpec) -> ZImageTransformer2DModel:
    """The base transformer in float32, with the version's adapters fused where it has any."""
    transformer = ZImageTransformer2DModel.from_pretrained(spec.base / "transformer", dtype=torch.float32)
    transformer.eval().requires_grad_(False)
    fuse_adapters(transformer, spec.adapters, str(spec.base))
    return transformer


def _shortened(encoder: Qwen3Model) -> Qwen3Model:
    """Without its last layer and final norm: conditioning is the second to last hidden state."""
    encoder.layers = encoder.layers[:-1]
    encoder.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue] - a norm to transformers' own code
    return encoder
