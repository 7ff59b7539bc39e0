"""Every family with graphs in place of its networks. Tokens, padding and what joins the parts stay the family's own."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn

from tdm_serve.artifact import Artifact
from tdm_serve.backends.parts import ExportedDecoder, ExportedDenoiser, Parts, in_pieces
from tdm_serve.models.families.base import Family
from tdm_serve.models.families.sd3 import SD3
from tdm_serve.models.families.sd3_denoiser import SD3Denoiser
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.lora import Base
from tdm_serve.models.placement import Placement
from tdm_serve.models.routed import Route
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters, Versions


class Exported(Family):
    """Goes before a family in its subclass's bases."""

    def __init__(self, spec: ModelSpec, placement: Placement, artifact: Artifact, parts: Parts) -> None:
        self.artifact, self.parts = artifact, parts
        self.exact_on_cpu = parts.exact_on_cpu
        self.runtime = artifact.kind if artifact.quantise == "none" else f"{artifact.kind} {artifact.quantise}"
        super().__init__([spec], placement)

    def load_vae(self) -> AutoencoderKL:
        config: Any = AutoencoderKL.load_config(self.spec.base / "vae")
        return cast(AutoencoderKL, ExportedDecoder(self.parts, config, self.artifact))

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        self.denoiser = self.exported_denoiser()
        self.channels = self.artifact.channels
        self.versions = Versions(Base(str(self.spec.base), "", {}), {}, {specs[0].id: ()}, adapters)

    def exported_denoiser(self) -> nn.Module:
        return ExportedDenoiser(self.parts, self.artifact)

    def graph(self, part: str, *tail: int, **inputs: Tensor) -> Tensor:
        """A graph's output (B, *tail), whatever the number of rows."""
        return in_pieces(self.parts, part, inputs, tail, self.artifact.batch)


class ExportedZImageDenoiser(ExportedDenoiser):
    """`ZImageDenoiser`'s functions."""

    def modulation(self, sigma: Tensor, route: Route = ()) -> Tensor:
        del route
        return self.parts.run("modulation", {"sigma": sigma}, (len(sigma), -1, -1))

    def refine_text(self, text: Tensor, lengths: Tensor, route: Route = ()) -> Tensor:
        del route
        return self.parts.run("refiner", {"features": text, "lengths": lengths}, (*text.shape[:2], -1))


class ExportedZImage(Exported, ZImage):
    def load_text(self) -> None:
        self.load_tokenizer()

        def encode(input_ids: Tensor, attention_mask: Tensor) -> Any:
            features = self.graph("text_encoder", input_ids.shape[1], -1, ids=input_ids, mask=attention_mask)
            return SimpleNamespace(last_hidden_state=features)

        self.text_encoder = cast(Any, encode)

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        super().load_denoiser(specs, adapters)
        self.start_modulation()

    def exported_denoiser(self) -> ZImageDenoiser:
        return cast(ZImageDenoiser, ExportedZImageDenoiser(self.parts, self.artifact))


class ExportedSD3Denoiser(ExportedDenoiser):
    """`SD3Denoiser`'s functions."""

    def modulation(self, time: Tensor, text: Tensor, route: Route = ()) -> Tensor:
        del route
        return self.parts.run("modulation", {"time": time, "pooled": text[:, -1]}, (len(time), -1, -1))

    def refine_text(self, text: Tensor, pooled: Tensor, route: Route = ()) -> Tensor:
        del route
        inputs = {"features": text, "pooled": pooled}
        return self.parts.run("refiner", inputs, (len(text), text.shape[1] + 1, -1))


class ExportedSD3(Exported, SD3):
    def load_text(self) -> None:
        self.load_readers()

    def read_clip(self, index: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        both = self.graph(CLIP_PARTS[index], ids.shape[1] + 1, -1, ids=ids)
        return both[:, :-1], both[:, -1]

    def read_t5(self, ids: Tensor) -> Tensor:
        return self.graph("text_encoder_3", ids.shape[1], -1, ids=ids)

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        super().load_denoiser(specs, adapters)
        self.read_config(cast(Any, SD3Transformer2DModel.load_config(self.spec.base / "transformer")))
        self.start_tables()

    def exported_denoiser(self) -> SD3Denoiser:
        return cast(SD3Denoiser, ExportedSD3Denoiser(self.parts, self.artifact))


CLIP_PARTS = ("text_encoder", "text_encoder_2")
FAMILIES: dict[str, type[Exported]] = {"zimage": ExportedZImage, "sd3": ExportedSD3}
