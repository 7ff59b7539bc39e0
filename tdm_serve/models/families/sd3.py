"""The SD3 and SD3.5 family: two CLIP encoders and, where the folder has it, T5; 16 latent channels.

T5 reads a prompt up to the checkpoint's limit, the CLIP encoders its first 77 tokens, which is how the models were
trained. The stock pipeline warns and lets CLIP miss the rest; here a prompt that some encoder would not read to its end
is refused, unless a request allows that it is cut. Then each encoder reads as far as it can, as in the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from tdm_serve.models.families.base import Family, too_long, with_versions
from tdm_serve.models.families.clip import Reader
from tdm_serve.models.families.sd3_denoiser import SD3Denoiser
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.routed import BASE, Variant
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters
from tdm_serve.sampling import Row

KEPT_TABLES = 64  # modulations, one for each noise level, prompt and version under way


class SD3(Family):
    """A loaded SD3 or SD3.5 base with one or more versions."""

    denoiser: SD3Denoiser

    def load_text(self) -> None:
        self.load_readers()
        self.clips = [self.encoder(CLIPTextModelWithProjection, name) for name in ("text_encoder", "text_encoder_2")]
        self.t5 = self.encoder(T5EncoderModel, "text_encoder_3") if self.has_t5 else None

    def load_readers(self) -> None:
        """The tokenizers."""
        base, limit = self.spec.base, self.spec.max_prompt_tokens
        self.readers = [Reader(base / "tokenizer"), Reader(base / "tokenizer_2")]
        self.has_t5 = bool(FAMILIES["sd3"].present(base, ("text_encoder_3",)))
        if self.has_t5:
            self.readers.append(Reader(base / "tokenizer_3", limit))
        self.length = self.readers[0].length + limit + 1  # CLIP's, T5's, and the pooled embedding

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        network, denoiser, self.channels = self.load_network()
        self.versions = with_versions(denoiser, network, specs, adapters)
        del network  # or the weights would stay behind where they were
        self.denoiser = self.ready(denoiser.pack()).use_kernels()
        self.start_tables()

    def start_tables(self) -> None:
        """No modulation is kept yet."""
        self._tables: dict[tuple[int, float, Variant], tuple[Tensor, Tensor]] = {}

    def load_network(self) -> tuple[nn.Module, SD3Denoiser, int]:
        """The transformer of the base, the denoiser over its parameters, and the latents' channels."""
        transformer = self.placement.network(SD3Transformer2DModel, self.spec.base / "transformer")
        self.read_config(transformer.config)
        denoiser = SD3Denoiser(transformer)
        return transformer, denoiser, denoiser.channels

    def read_config(self, config: Mapping[str, Any]) -> None:
        """What the transformer's configuration says of texts and sizes."""
        self.width = int(config["joint_attention_dim"])  # of text features
        self.pooled = int(config["pooled_projection_dim"])
        self.patch = int(config["patch_size"])
        self.longest = int(config["pos_embed_max_size"]) * self.patch

    def tokens(self, prompt: str, truncate: bool = False) -> list[int]:  # noqa: ARG002 - every reader has one length
        return list(chain.from_iterable(reader.fitted(prompt) for reader in self.readers))

    def count(self, prompt: str) -> int:
        return len(self.readers[-1].ids(prompt)) if self.has_t5 else len(self.readers[0].ids(prompt))

    def check_prompt(self, prompt: str, param: str = "prompt", truncate: bool = False) -> int:
        """Both CLIP tokenizers split alike, so the first one speaks for them."""
        named = [("CLIP", self.readers[0]), *(("T5", reader) for reader in self.readers[2:])]
        counts = [(name, len(reader.ids(prompt)), reader.length) for name, reader in named]
        if not truncate and any(count > limit for _, count, limit in counts):
            told = [f"{count} tokens for {name}, which reads at most {limit}" for name, count, limit in counts]
            raise too_long(param, ", and ".join(told))
        return self.length

    def encode(self, prompts: Sequence[Sequence[int]], *, together: bool = False) -> list[Tensor]:
        """Features (length, C) of each prompt; C is the wider of text and pooled embedding, and the last row is it."""
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.text_device)
        parts = ids.split(len(prompts) if together else 1)
        return [row.to(self.device, copy=True) for part in parts for row in self._encoded(part)]

    def _encoded(self, ids: Tensor) -> Tensor:
        """(B, length, C) of ids (B, all tokenizers' lengths)."""
        first, second, *third = ids.split([reader.length for reader in self.readers], dim=1)
        clips = [self.read_clip(index, part) for index, part in enumerate((first, second))]
        words = torch.cat([one for one, _ in clips], dim=-1)  # (B, 77, both widths)
        pooled = torch.cat([one for _, one in clips], dim=-1).unsqueeze(1)  # (B, 1, P)
        empty = (len(words), self.spec.max_prompt_tokens, self.width)
        rest = self.read_t5(third[0]) if self.has_t5 else words.new_zeros(empty)
        width = max(self.width, self.pooled)
        return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in (words, rest.to(words), pooled)], dim=1)

    def read_clip(self, index: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Second to last hidden state (B, 77, C) and pooled embedding (B, P) of ids (B, 77)."""
        output = self.clips[index](ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    def read_t5(self, ids: Tensor) -> Tensor:
        """(B, T, C) of ids (B, T); padding is attended, as the models were trained."""
        assert self.t5 is not None
        return self.t5(ids)[0]

    def refine(self, features: Tensor, length: int, version: Variant = BASE) -> Tensor:
        """Text (1, length, D): projected tokens, and the projected pooled embedding as the last row."""
        assert length == len(features) == self.length
        words, pooled = features[:-1, : self.width], features[-1:, : self.pooled]
        return self.denoiser.refine_text(words.unsqueeze(0), pooled, ((version, 1),))

    def timed(self, row: Row, text: Tensor, version: Variant = BASE) -> Tensor:
        """Modulation (1, M, D) of one noise level for one prompt's text (1, L, D); the latest ones are kept."""
        key = (id(text), row.t, version)  # the text is kept beside its table, so its id stays its own
        if key not in self._tables:
            if len(self._tables) == KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            time = torch.tensor([row.t], dtype=torch.float32, device=self.device)
            self._tables[key] = text, self.denoiser.modulation(time, text, ((version, 1),))
        return self._tables[key][1]
