"""What an adapter is once it is in memory, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_serve.errors import CheckpointError
from tdm_serve.models.lora.base import Base


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: scale * B A, with A (r, in...), B (out, r...) and scale alpha / r.

    Convolutions have kernels behind: A (r, in, k, k) and B (out, r, 1, 1).
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        return self.b.shape[0], *self.a.shape[1:]

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the adapter in it, summed in float32 and rounded once to the weight's own type."""
        a, b = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.a, self.b))
        return (weight.float() + self.scale * (b @ a).reshape(weight.shape)).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter: module name in the denoiser -> what is added there. `warnings` are sentences for its user."""

    modules: Mapping[str, Delta]
    source: str
    warnings: tuple[str, ...] = ()


def check_fits(lora: Lora, base: Base) -> None:
    """Raises CheckpointError unless every module of an adapter is in the base with that shape, and some are changed."""
    absent = [name for name in lora.modules if name not in base.layers]
    if absent:
        raise CheckpointError(
            f"adapter {lora.source} names {absent[0]}, which the base does not have: {len(absent)} of its "
            f"{len(lora.modules)} modules are not in {base.name} ({base.class_name}); use the base that it was made for"
        )
    for name, delta in lora.modules.items():
        if delta.shape != base.layers[name]:
            raise CheckpointError(
                f"adapter {lora.source} changes {name} by {delta.shape}, but the base has {base.layers[name]}; it was "
                "made for another base"
            )
    check_changes(lora)


def check_changes(lora: Lora) -> None:
    """Raises CheckpointError for an adapter whose B matrices are all zero, as those of an untrained one are."""
    if not any(bool(delta.b.any()) for delta in lora.modules.values()):
        raise CheckpointError(
            f"adapter {lora.source} changes nothing: all of its {len(lora.modules)} B matrices are zero, as before the "
            "first training step; use the trained file"
        )


def combined(loras: Sequence[tuple[Lora, float]]) -> Lora:
    """Several adapters, each with a factor, as one: ranks are stacked, which equals adding one after the other."""
    if len(loras) == 1 and loras[0][1] == 1.0:
        return loras[0][0]
    grouped: dict[str, list[Delta]] = {}
    for lora, factor in loras:
        for name, delta in lora.modules.items():
            grouped.setdefault(name, []).append(Delta(delta.a, delta.b, delta.scale * factor))
    return Lora(
        {name: _stacked(deltas) for name, deltas in grouped.items()},
        " + ".join(lora.source for lora, _ in loras),
        tuple(warning for lora, _ in loras for warning in lora.warnings),
    )


def _stacked(deltas: Sequence[Delta]) -> Delta:
    """The sum of changes to one weight; scales move into B in float32, since each has its own."""
    if len(deltas) == 1:
        return deltas[0]
    a = torch.cat([delta.a.float() for delta in deltas])  # (r1 + r2, in...)
    b = torch.cat([delta.scale * delta.b.float() for delta in deltas], dim=1)  # (out, r1 + r2...)
    return Delta(a, b, 1.0)
