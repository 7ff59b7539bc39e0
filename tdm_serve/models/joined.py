"""Linears of one input as one matrix product: for training (`Joined`), inference (`Packed`) and several versions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_serve.models.routed import Routed

M = TypeVar("M", bound=nn.Module)


class Joined(nn.Module):
    """Several projections of one input, outputs side by side; keeps the originals, so adapters on them still train."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class Packed(nn.Linear):
    """Several linears of one input, all with a bias or none, as one matrix product; `rows` are each one's outputs."""

    def __init__(self, joined: Joined) -> None:
        linears = [cast(nn.Linear, part) for part in joined.parts]
        weight = torch.cat([linear.weight for linear in linears])
        biased = linears[0].bias is not None  # pyright: ignore[reportUnnecessaryComparison] - declared without None
        super().__init__(weight.shape[1], weight.shape[0], bias=biased, device="meta")
        self.rows = tuple(linear.out_features for linear in linears)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if biased:
            self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]).detach(), requires_grad=False)
        for linear, part in zip(linears, self.weight.detach().split(self.rows), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)  # a view, so that nothing is in memory twice


def pack_all(root: nn.Module) -> None:
    """Packs every `Joined` below `root` in place; the result no longer trains."""
    for module in list(root.modules()):
        for attribute, child in list(module.named_children()):
            if isinstance(child, Joined):
                setattr(module, attribute, Packed(child))


def share(
    root: nn.Module, names: Mapping[nn.Module, str], wanted: Collection[str], apart: Iterable[nn.Module]
) -> dict[str, Routed]:
    """Makes the `wanted` linears below `root` ready for several versions; returns them by name. Comes before packing.

    `names` are those that adapters use. `apart` are modules that no route reaches: neither they nor names that do not
    exist are among the result.
    """
    found: dict[str, Routed] = {}
    closed = set(apart)  # and what Joined holds, which is replaced as a whole
    closed |= {part for module in root.modules() if isinstance(module, Joined) for part in (module, module.parts)}
    for module in [module for module in root.modules() if module not in closed]:
        for attribute, child in list(module.named_children()):
            parts = [*child.parts] if isinstance(child, Joined) else [child]
            called = [names.get(part, "") for part in parts if isinstance(part, nn.Linear)]
            if any(name in wanted for name in called):
                base = Packed(child) if isinstance(child, Joined) else cast(nn.Linear, child)
                routed = Routed(base, dict(zip(called, _rows(parts), strict=True)))
                setattr(module, attribute, routed)
                found |= dict.fromkeys(called, routed)
    return found


def _rows(parts: Sequence[nn.Module]) -> list[slice]:
    """The output rows of each of several linears in the packed one."""
    ends = list(accumulate(cast(nn.Linear, part).weight.shape[0] for part in parts))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def present(part: M | None) -> M:
    """diffusers declares the parts of its attention optional; the families here have the ones they ask for."""
    assert part is not None
    return part


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    """diffusers' RMSNorm in one call; the mean square is taken in float32 whatever x is."""
    weight = cast(Tensor, norm.weight)
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), cast(float, norm.eps))
