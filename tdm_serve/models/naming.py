"""State dicts of a dense denoiser under the names of the diffusers module whose parameters it uses.

Its own modules are arranged otherwise, and packing puts several of the original's matrices into one, so keys are
translated on the way out and in: a state dict of either fits the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdm_serve.models.joined import Packed
from tdm_serve.models.routed import Routed

State = dict[str, Any]


def named_as(module: nn.Module, source: nn.Module) -> None:
    """Gives `module`, built over the parameters of `source`, state dicts with the keys of `source`.

    It holds before and after packing and sharing; what single versions have of their own is not part of it.
    """
    theirs = {id(value): name for name, value in _values(source)}
    names = {name: theirs[id(value)] for name, value in _values(module)}

    def outwards(module: nn.Module, state: State, prefix: str, _metadata: Mapping[str, Any]) -> None:
        for own, parts in list(_parts(module, names)):
            value = cast(Tensor, state.pop(prefix + own))
            pieces = value.split([rows for _, rows in parts]) if len(parts) > 1 else [value]
            state.update({prefix + name: piece for (name, _), piece in zip(parts, pieces, strict=True)})

    def inwards(module: nn.Module, state: State, prefix: str, *_rest: object) -> None:
        for own, parts in list(_parts(module, names)):
            found = [prefix + name for name, _ in parts]
            if all(name in state for name in found):  # what is missing is then told under our own name
                pieces = [cast(Tensor, state.pop(name)) for name in found]
                state[prefix + own] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    module.register_state_dict_post_hook(outwards)
    module.register_load_state_dict_pre_hook(inwards)


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, once under every name that they have in state dicts."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def _parts(module: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Each key of our own with the original's keys of what it holds, and the rows of each where it holds several."""
    for path, child in module.named_modules():
        shared = isinstance(module.get_submodule(path.rpartition(".")[0]), Routed)
        place = path.removesuffix(".base") if shared else path
        for kind, _ in chain(child.named_parameters(recurse=False), child.named_buffers(recurse=False)):
            own = [f"{place}.{kind}".removeprefix(".")]
            if isinstance(child, Packed):
                own = [f"{place}.parts.{index}.{kind}" for index in range(len(child.rows))]
            if all(name in names for name in own):
                rows = child.rows if isinstance(child, Packed) else (0,)
                yield f"{path}.{kind}".removeprefix("."), [*zip(map(names.__getitem__, own), rows, strict=True)]
