"""Exported graphs as AOTInductor packages: machine code, loaded without a compiler and without compiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import aoti_load_package  # torch documents it under this name

from tdm_serve.artifact import Artifact
from tdm_serve.backends.base import Denoise
from tdm_serve.backends.exported import as_backend
from tdm_serve.errors import ArtifactError
from tdm_serve.machine import cpu_name


def create(denoiser: nn.Module) -> Denoise:
    """An exported denoiser is a backend by itself."""
    return as_backend(denoiser, "pt2")


class Pt2Parts:
    """The packages of an engine's folder, loaded."""

    exact_on_cpu = False  # what the compiler fuses may add up in another order for another batch

    def __init__(self, folder: Path, artifact: Artifact) -> None:
        try:
            self._packages: dict[str, Any] = {
                name: aoti_load_package(str(folder / facts[0].name)) for name, facts in artifact.parts.items()
            }
        except RuntimeError as error:
            raise ArtifactError(f"{folder} cannot be loaded by torch {torch.__version__}: {error}") from error

    def run(self, part: str, inputs: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The output of one package, whose shape is known to it."""
        del shape
        return self._packages[part](*(tensor.contiguous() for tensor in inputs.values()))


def open_parts(folder: Path, artifact: Artifact, device: torch.device, backend: str) -> Pt2Parts:
    """All packages of an engine. Raises ArtifactError where they were compiled for something else."""
    del backend
    here = {"torch": torch.__version__.partition("+")[0], "processor": cpu_name()}
    made = {"torch": artifact.versions.get("torch", "").partition("+")[0], "processor": artifact.machine}
    for what, value in here.items():
        if made[what] != value:
            raise ArtifactError(
                f"{folder} was compiled for the {what} {made[what]}, and here is {value}; export the checkpoint here"
            )
    if device.type != "cpu":
        raise ArtifactError(f"{folder} was compiled for a CPU; serve it with --device cpu")
    return Pt2Parts(folder, artifact)
