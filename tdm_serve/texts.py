"""The text of a batch, through the prompt cache: each different prompt is encoded once, and refined once a variant."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tdm_serve.models.families.base import Family
from tdm_serve.models.routed import Variant
from tdm_serve.prompt_cache import PromptCache


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the denoiser wants it: token ids, padded length, and whose layers refine it."""

    tokens: tuple[int, ...]
    length: int
    variant: Variant


class Texts:
    """Refined text of one base's variants. Text features are kept, too, where `several` want them."""

    def __init__(self, model: Family, cache: PromptCache, encoder_hash: str, *, several: bool, together: bool) -> None:
        self._model, self._cache, self._encoder = model, cache, (encoder_hash, model.spec.max_prompt_tokens)
        self._several, self._together = several, together

    def kept(self, texts: Iterable[Text]) -> bool:
        """Whether all of these are in the cache. Safe from any thread."""
        return all(self._key(text) in self._cache for text in texts)

    def get(self, texts: Iterable[Text]) -> dict[Text, Tensor]:
        """(1, length, D) of each text. Equal ones are looked up, and made, once."""
        found = {text: self._cache.get(self._key(text)) for text in dict.fromkeys(texts)}
        ready = {text: tensor for text, tensor in found.items() if tensor is not None}
        missing = [text for text in found if text not in ready]
        features = self._features(list(dict.fromkeys(text.tokens for text in missing)))
        for text in missing:
            ready[text] = self._model.refine(features[text.tokens], text.length, text.variant)
            self._cache.put(self._key(text), ready[text])
        return ready

    def _features(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        found = {prompt: self._cache.get((self._encoder, prompt), counted=False) for prompt in prompts}
        ready = {prompt: tensor for prompt, tensor in found.items() if tensor is not None}
        missing = [prompt for prompt in prompts if prompt not in ready]
        if missing:
            ready |= zip(missing, self._model.encode(missing, together=self._together), strict=True)
        if self._several:
            for prompt in missing:
                self._cache.put((self._encoder, prompt), ready[prompt])
        return ready

    def _key(self, text: Text) -> Hashable:
        return self._encoder, text
