"""Generator, fake score, surrogate and base as different weights of one network.

With LoRA, every target linear of the shared, frozen network is wrapped once, and a role puts its own low-rank pair in
place before it runs: one copy of the base serves all roles. With full weights a role is a copy of the network. Either
way a role is called like the network and lists its trainable tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdm_finetune.trainee import Conditioning, Trainee
from tdm_serve.errors import ConfigError
from tdm_serve.models.lora import Delta, Lora, write_lora

ADAPTER_FILE = "adapter.safetensors"
FULL_FOLDER = "full"
Pair = tuple[Tensor, Tensor]  # A (r, in), B (out, r)


class Adapted(nn.Module):
    """A frozen linear plus alpha / r * B A of whichever role is in place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.pair: Pair | None = None
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Merges the pair into the weight where that costs fewer multiplications than two thin products per token."""
        if self.pair is None:
            return self.linear(x)
        a, b = self.pair
        out, into = self.linear.weight.shape
        tokens = x.numel() // into
        if out * into < tokens * (out + into):
            return F.linear(x, torch.addmm(self.linear.weight, b, a, alpha=self.scale), self.linear.bias)
        return self.linear(x) + self.scale * F.linear(F.linear(x, a), b)


class Role(Protocol):
    """One set of weights of the network."""

    parameters: list[Tensor]

    def __call__(self, latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output (B, C, H, W) in float32, whatever autocast does inside."""
        ...

    def save(self, folder: Path) -> None:
        """Writes these weights as serving reads them: an adapter file, or the family's folder."""
        ...


class Roles:
    """Makes the roles of one trainee. `rank` 0 trains full weights."""

    def __init__(self, trainee: Trainee, rank: int, alpha: float, *, compiled: bool = False) -> None:
        self.trainee, self.rank, self.alpha = trainee, rank, alpha
        self.names = list(trainee.linears())
        self.adapted = _wrap(trainee.net, list(trainee.linears().values())) if rank else []
        self._compiled = compiled
        self.run = torch.compile(trainee.net) if compiled else trainee.net

    def recompute(self, blocks: Sequence[nn.Module]) -> None:
        """Gradient checkpointing: each block keeps its inputs only and runs again in the backward pass.

        By then another role may be in place, so a block remembers whose turn it was.
        """
        for block in blocks:  # bound, so that a copy of the network gets methods of its own blocks
            block.forward = MethodType(self._recomputed(type(block).forward), block)

    def _recomputed(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(block: nn.Module, *inputs: Any, **named: Any) -> Tensor:
            placed = [adapted.pair for adapted in self.adapted]

            def again(*inputs: Any, **named: Any) -> Tensor:
                for adapted, pair in zip(self.adapted, placed, strict=True):
                    adapted.pair = pair
                return forward(block, *inputs, **named)

            return cast(Tensor, checkpoint(again, *inputs, use_reentrant=False, **named))

        return run

    def base(self, latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The frozen network itself: teacher and reference."""
        self._place(None)
        return self.run(latents, level, *conditioning).float()

    def new(self, generator: torch.Generator, adapter: Lora | None = None) -> Role:
        """A role that equals the base, or the base with the LoRA `adapter`, until it is trained."""
        if self.rank:
            return LoraRole(self, generator, adapter)
        if adapter is not None:
            raise ConfigError(
                f"rank is 0, which trains full weights, but the checkpoint's version is {adapter.source}, a LoRA"
            )
        return FullRole(self.trainee, compiled=self._compiled)

    def with_pairs(self, pairs: list[Pair], latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        self._place(pairs)
        return self.run(latents, level, *conditioning).float()

    def _place(self, pairs: list[Pair] | None) -> None:
        for index, adapted in enumerate(self.adapted):
            adapted.pair = None if pairs is None else pairs[index]
            adapted.scale = self.alpha / self.rank


class LoraRole:
    """Low-rank pairs for every target. A starts random and B at zero, as PEFT's `gaussian` initialisation does."""

    def __init__(self, roles: Roles, generator: torch.Generator, adapter: Lora | None) -> None:
        self.roles, rank = roles, roles.rank
        weights = [adapted.linear.weight for adapted in roles.adapted]
        self.pairs: list[Pair] = [
            (torch.randn(rank, w.shape[1], generator=generator) / rank, torch.zeros(w.shape[0], rank)) for w in weights
        ]
        if adapter is not None:
            self._read(adapter)
        self.pairs = [
            (a.to(w.device).requires_grad_(), b.to(w.device).requires_grad_())
            for w, (a, b) in zip(weights, self.pairs, strict=True)
        ]
        self.parameters: list[Tensor] = [tensor for pair in self.pairs for tensor in pair]

    def __call__(self, latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        return self.roles.with_pairs(self.pairs, latents, level, conditioning)

    def _read(self, adapter: Lora) -> None:
        """Starts from a LoRA of the same targets; another scale alpha / r is folded into B."""
        found = adapter.modules
        if set(found) != set(self.roles.names):
            odd = sorted(set(found) ^ set(self.roles.names))
            raise ConfigError(
                f"adapter {adapter.source} is for other modules than this trainer adapts, for example {odd[0]}"
            )
        rank = next((delta.rank for delta in found.values() if delta.rank != self.roles.rank), None)
        if rank is not None:
            raise ConfigError(f"rank is {self.roles.rank}, but adapter {adapter.source} has rank {rank}; use its rank")
        scale = self.roles.alpha / self.roles.rank
        deltas = [found[name] for name in self.roles.names]
        self.pairs = [(delta.a.float(), delta.b.float() * (delta.scale / scale)) for delta in deltas]

    def save(self, folder: Path) -> None:
        """`adapter.safetensors` in bfloat16 as diffusers' `load_lora_weights` reads it, alpha in the metadata."""
        scale, component = self.roles.alpha / self.roles.rank, self.roles.trainee.component
        deltas = {name: Delta(a, b, scale) for name, (a, b) in zip(self.roles.names, self.pairs, strict=True)}
        write_lora(Lora(deltas, "trained"), folder / ADAPTER_FILE, component, dtype=torch.bfloat16)


class FullRole:
    """A trainable copy of the whole network."""

    def __init__(self, trainee: Trainee, *, compiled: bool) -> None:
        self.trainee = trainee
        self.net = copy.deepcopy(trainee.net).requires_grad_()
        self.run = torch.compile(self.net) if compiled else self.net
        self.parameters: list[Tensor] = list(self.net.parameters())

    def __call__(self, latents: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        return self.run(latents, level, *conditioning).float()

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """The family's own folder, with these weights; the trainee's are put back."""
        base = list(self.trainee.net.parameters())
        kept = [parameter.clone() for parameter in base]
        _copy(self.parameters, base)
        try:
            self.trainee.save(folder / FULL_FOLDER)
        finally:
            _copy(kept, base)


def _copy(values: list[Tensor], into: list[nn.Parameter]) -> None:
    for value, parameter in zip(values, into, strict=True):
        parameter.copy_(value)


def _wrap(net: nn.Module, linears: list[nn.Linear]) -> list[Adapted]:
    """Replaces each of `linears` wherever `net` holds it; the wrappers, in the order of `linears`."""
    wrapped: Mapping[int, Adapted] = {id(linear): Adapted(linear) for linear in linears}
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if id(child) in wrapped:
                setattr(module, name, wrapped[id(child)])
    return [wrapped[id(linear)] for linear in linears]
