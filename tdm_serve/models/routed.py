"""Linears that several versions of one base share: which rows of a batch take which version's weight.

A version differs from its base in some linears only. Each of those becomes a `Routed`: the shared base weight and, per
version, either a copy of that one weight with the adapter added ("fused": as fast as a plain linear) or the adapter's
two thin matrices ("separate": little memory, two more products, and every picture may have them at a strength of its
own). Everything else exists once. The route travels as an argument through every call, so no state says whose turn it
is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_serve.models.lora import Delta


class Variant(NamedTuple):
    """What a picture is made with: a version, and by how much its adapter is multiplied. 0 is the base, bit by bit.

    Whatever is kept of a version's own layers is kept by variant.
    """

    version: str
    scale: float = 1.0


BASE = Variant("")  # no version's
Route = tuple[tuple[Variant, int], ...]  # (variant, rows) of each run of rows in a batch; () is the base for all


@dataclass(frozen=True, slots=True)
class Thin:
    """An adapter kept apart: for some output rows of a packed linear, A (r, in) and B (rows, r) with the scale in B."""

    parts: tuple[tuple[slice, Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for _, a, b in self.parts)


class Routed(nn.Module):
    """A linear, perhaps packed of several, with what some versions have of their own."""

    def __init__(self, base: nn.Linear, parts: Mapping[str, slice]) -> None:
        """`parts` are the names of the packed linears and their output rows."""
        super().__init__()
        self.base = base
        self.parts = dict(parts)
        self.own: dict[str, Tensor | Thin] = {}

    def forward(self, x: Tensor, route: Route = ()) -> Tensor:
        """x (B, ..., in) -> (B, ..., out); rows go to their versions as `route` says."""
        if not any(variant.version in self.own for variant, _ in route):
            return self.base(x)
        if len(route) == 1:
            return self._of(x, route[0][0])
        pieces = x.split([rows for _, rows in route])
        return torch.cat([self._of(piece, variant) for piece, (variant, _) in zip(pieces, route, strict=True)])

    def _of(self, x: Tensor, variant: Variant) -> Tensor:
        own = self.own.get(variant.version)
        if own is None or variant.scale == 0.0:
            return self.base(x)
        if isinstance(own, Tensor):
            assert variant.scale == 1.0, "an adapter that is in the weights has one strength"
            return F.linear(x, own, self.base.bias)
        y = self.base(x)
        for rows, a, b in own.parts:
            y[..., rows].add_(F.linear(F.linear(x, a), b), alpha=variant.scale)
        return y

    def fused(self, adapters: Mapping[str, Delta]) -> Tensor:
        """The base weight with `adapters` (part name -> adapter) added in float32."""
        weight = self.base.weight.detach().clone()
        for name, delta in adapters.items():
            rows = self.parts[name]
            weight[rows] = delta.added_to(weight[rows])
        return weight

    def thin(self, adapters: Mapping[str, Delta]) -> Thin:
        like = self.base.weight
        parts = [
            (self.parts[name], delta.a.to(like), (delta.scale * delta.b.float()).to(like))
            for name, delta in adapters.items()
        ]
        return Thin(tuple(parts))


def project(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    """A linear, or a chain with linears in it, with its rows on their routes."""
    if isinstance(module, Routed):
        return module(x, route)
    if route and isinstance(module, nn.Sequential):
        for part in module:
            x = project(part, x, route)
        return x
    return module(x)


def route_of(variants: Sequence[Variant]) -> Route:
    """The route of a batch whose row i is of `variants[i]`; equal neighbours make one run."""
    runs: list[tuple[Variant, int]] = []
    for variant in variants:
        if runs and runs[-1][0] == variant:
            runs[-1] = (variant, runs[-1][1] + 1)
        else:
            runs.append((variant, 1))
    return tuple(runs)
