"""What answers in place of torch's modules: the graphs of an exported engine, behind the modules' own calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from tdm_serve.artifact import Artifact
from tdm_serve.models.routed import Route


class Parts(Protocol):
    """The graphs of an engine, opened on a device."""

    @property
    def exact_on_cpu(self) -> bool: ...

    def run(self, part: str, inputs: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """A graph's output; `shape` is the output's, with -1 for widths that only the graph knows."""
        ...


def in_pieces(parts: Parts, part: str, inputs: Mapping[str, Tensor], tail: Sequence[int], batch: int) -> Tensor:
    """A graph's output (B, *tail) of any number of rows, of which it takes up to `batch` at once."""
    columns = [tensor.split(batch) for tensor in inputs.values()]
    pieces = [
        parts.run(part, dict(zip(inputs, piece, strict=True)), (len(piece[0]), *tail))
        for piece in zip(*columns, strict=True)
    ]
    return torch.cat(pieces)


class ExportedDenoiser(nn.Module):
    """A denoiser's call. Batches are cut to what the engine takes, and to rows with texts of one length."""

    def __init__(self, parts: Parts, artifact: Artifact) -> None:
        super().__init__()
        self.parts, self.batch, self.channels = parts, artifact.batch, artifact.channels

    def forward(
        self, latents: Tensor, modulation: Tensor, text: Tensor, route: Route = (), lengths: Tensor | None = None
    ) -> Tensor:
        """As each family's denoiser; an engine has one version, so the route is no matter."""
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


class ExportedDecoder(nn.Module):
    """The autoencoder's decoding half."""

    def __init__(self, parts: Parts, config: Mapping[str, Any], artifact: Artifact) -> None:
        super().__init__()
        self.parts, self.config = parts, config
        self.batch, self.factor = artifact.batch, artifact.factor

    def decode(self, latents: Tensor) -> DecoderOutput:
        height, width = (side * self.factor for side in latents.shape[-2:])
        pixels = in_pieces(self.parts, "decoder", {"latents": latents}, (3, height, width), self.batch)
        return DecoderOutput(sample=pixels)
