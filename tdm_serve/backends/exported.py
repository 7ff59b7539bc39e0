"""An exported engine as a family: the same calls, each answered by a graph. No torch weights are loaded.

The checkpoint is needed for its tokenizer and its sampling table, and must be the one that the engine was made from.
Loading checks everything that could make other pictures than were verified, and says which of it does not match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from tdm_serve.artifact import Artifact, check_checkpoint, check_files, check_kind, read_artifact
from tdm_serve.backends.base import needs_engine
from tdm_serve.errors import ArtifactError, ConfigError
from tdm_serve.files import sha256
from tdm_serve.models.catalog import Reference
from tdm_serve.models.families.zimage import ZImage
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser
from tdm_serve.models.inspect import checkpoint_hash, encoder_hash
from tdm_serve.models.load import Loaded, Served, examine, pick_device, pick_dtype
from tdm_serve.models.lora import Base
from tdm_serve.models.placement import placement_on
from tdm_serve.models.routed import Route
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters, Versions

RUNTIMES = {"onnx": "tdm_serve.backends.onnx", "pt2": "tdm_serve.backends.pt2"}
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Parts(Protocol):
    """The graphs of an engine, opened on a device."""

    @property
    def exact_on_cpu(self) -> bool: ...

    def run(self, part: str, inputs: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """A graph's output; `shape` is the output's, with -1 for widths that only the graph knows."""
        ...


class ExportedDenoiser(nn.Module):
    """`ZImageDenoiser`'s functions. Batches are cut to what the engine takes, and to rows with texts of one length."""

    def __init__(self, parts: Parts, batch: int, channels: int) -> None:
        super().__init__()
        self.parts, self.batch, self.channels = parts, batch, channels

    def modulation(self, sigma: Tensor, route: Route = ()) -> Tensor:
        del route
        return self.parts.run("modulation", {"sigma": sigma}, (len(sigma), -1, -1))

    def refine_text(self, text: Tensor, lengths: Tensor, route: Route = ()) -> Tensor:
        del route
        return self.parts.run("refiner", {"features": text, "lengths": lengths}, (*text.shape[:2], -1))

    def forward(
        self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor:
        """As `ZImageDenoiser.forward`; an engine has one version, so the route is no matter."""
        del route
        rows = [text.shape[1]] * len(text) if lengths is None else lengths.tolist()
        pieces: list[Tensor] = []
        start = 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop] != rows[start] or stop - start == self.batch:
                part = slice(start, stop)
                inputs = {"latents": latents[part], "modulation": modulation[part], "text": text[part, : rows[start]]}
                pieces.append(self.parts.run("denoiser", inputs, latents[part].shape))
                start = stop
        return torch.cat(pieces)


class ExportedTextEncoder(nn.Module):
    """The text encoder's call, for up to `batch` prompts a graph."""

    def __init__(self, parts: Parts, batch: int) -> None:
        super().__init__()
        self.parts, self.batch = parts, batch

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        pieces = [
            self.parts.run("text_encoder", {"ids": ids, "mask": mask}, (*ids.shape, -1))
            for ids, mask in zip(input_ids.split(self.batch), attention_mask.split(self.batch), strict=True)
        ]
        return SimpleNamespace(last_hidden_state=torch.cat(pieces))


class ExportedDecoder(nn.Module):
    """The autoencoder's decoding half."""

    def __init__(self, parts: Parts, config: Mapping[str, Any], artifact: Artifact) -> None:
        super().__init__()
        self.parts, self.config = parts, config
        self.batch, self.factor = artifact.batch, artifact.factor

    def decode(self, latents: Tensor) -> DecoderOutput:
        pieces = [self._decode(part) for part in latents.split(self.batch)]
        return DecoderOutput(sample=torch.cat(pieces))

    def _decode(self, latents: Tensor) -> Tensor:
        height, width = (side * self.factor for side in latents.shape[-2:])
        return self.parts.run("decoder", {"latents": latents}, (len(latents), 3, height, width))


class ExportedZImage(ZImage):
    """A Z-Image version whose networks are graphs."""

    def __init__(self, spec: ModelSpec, artifact: Artifact, parts: Parts, device: torch.device) -> None:
        self._artifact, self._parts = artifact, parts
        self.exact_on_cpu = parts.exact_on_cpu
        self.runtime = artifact.kind if artifact.quantise == "none" else f"{artifact.kind} {artifact.quantise}"
        super().__init__([spec], placement_on(device, pick_dtype(DTYPE_NAMES[artifact.dtype], device)))

    def load_vae(self) -> AutoencoderKL:
        config: Any = AutoencoderKL.load_config(self.spec.base / "vae")
        return cast(AutoencoderKL, ExportedDecoder(self._parts, config, self._artifact))

    def load_text(self) -> None:
        self.load_tokenizer()
        encoder: Any = ExportedTextEncoder(self._parts, self._artifact.batch)
        self.text_encoder = encoder

    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        self.denoiser = cast(
            ZImageDenoiser, ExportedDenoiser(self._parts, self._artifact.batch, self._artifact.channels)
        )
        self.channels = self._artifact.channels
        self.versions = Versions(Base(str(self.spec.base), "", {}), {}, {specs[0].id: ()}, adapters)
        self.start_modulation()


def load_exported(
    references: Reference | Sequence[Reference], folder: Path, backend: str, device: str = "auto", dtype: str = "auto"
) -> tuple[Loaded, str]:
    """An engine's folder and its checkpoint, matched and opened, and the backend that "auto" stands for.

    Raises ArtifactError with what does not match, ConfigError for settings that an engine has none of,
    BackendUnavailable or MissingExtra where its runtime is not here.
    """
    artifact = read_artifact(folder)
    name = artifact.kind if backend == "auto" else backend
    reference = _single(references)
    check_kind(artifact, name.partition("-")[0])
    check_files(folder, artifact)
    spec, files = examine(reference)
    digest = cache(sha256)
    whole = checkpoint_hash(spec, files, digest)
    check_checkpoint(artifact, spec.id, whole)
    _check_dtype(artifact, dtype)
    place = pick_device(device)
    parts: Parts = import_module(RUNTIMES[artifact.kind]).open_parts(folder, artifact, place, name)
    narrowed = narrow(spec, artifact)
    model = ExportedZImage(narrowed, artifact, parts, place)
    return Loaded(model, (Served(narrowed, whole),), encoder_hash(spec, digest)), name


def _single(references: Reference | Sequence[Reference]) -> Reference:
    if isinstance(references, str | Path | ModelSpec):
        return references
    if len(references) != 1:
        raise ConfigError(f"an exported engine holds one version, and {len(references)} models were named; name one")
    return references[0]


def _check_dtype(artifact: Artifact, dtype: str) -> None:
    exported = DTYPE_NAMES[artifact.dtype]
    if dtype not in ("auto", exported):
        raise ArtifactError(f"the engine computes in {exported}, and {dtype} was asked for; leave the dtype out")


def narrow(spec: ModelSpec, artifact: Artifact) -> ModelSpec:
    """What an engine serves of its checkpoint: the exported sizes and text length, and no other."""
    width, height = (spec.width, spec.height) if (spec.width, spec.height) in artifact.sizes else artifact.sizes[0]
    return replace(
        spec,
        width=width,
        height=height,
        sizes=artifact.sizes,
        max_prompt_tokens=artifact.text,
        preview=cast(Any, artifact.preview),
    )


def as_backend(denoiser: nn.Module, name: str) -> ExportedDenoiser:
    """An exported denoiser runs by itself. Raises ConfigError for any other."""
    if not isinstance(denoiser, ExportedDenoiser):
        raise needs_engine(name)
    return denoiser
