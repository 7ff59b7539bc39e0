"""What a run takes from its checkpoint and may choose otherwise: picture size, noise, modules with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from tdm_finetune.process import Diffusion, Flow, Process
from tdm_serve.errors import ConfigError
from tdm_serve.models.adapters import read_adapters
from tdm_serve.models.lora import Lora, base_of
from tdm_serve.models.spec import ModelSpec

TEXT_CACHE_MB = 4096  # of encoded prompts on the CPU: for SD3 about 700 prompts, at 5.5 MB each


@dataclass(frozen=True, slots=True)
class Choices:
    """Zeros and nothing keep what the checkpoint, or its family, has."""

    size: int = 0  # side of the square pictures, in pixels
    shift: float = 0.0  # of flow matching; a checkpoint may have one for each size
    top: int = 0  # of a variance-preserving process: the noising step at which the student starts
    targets: tuple[str, ...] = ()  # modules that adapters go on: names, or their last parts
    text_tokens: int = 32  # of Z-Image; the other families read texts of one length
    truncate: bool = False  # prompts that are too long are cut, instead of refused
    held: torch.dtype = torch.float32  # of the frozen network


def picture_size(spec: ModelSpec, choices: Choices) -> tuple[int, int]:
    """Width and height; ConfigError for a side that the checkpoint cannot draw."""
    side = choices.size
    if not side:
        return spec.width, spec.height
    if side % spec.size_multiple or not spec.min_side <= side <= spec.max_side:
        raise ConfigError(
            f"size is {side}; {spec.id} draws sides from {spec.min_side} to {spec.max_side} pixels, in steps of "
            f"{spec.size_multiple}"
        )
    return side, side


def process(spec: ModelSpec, choices: Choices) -> Process:
    """The forward process of a checkpoint. ConfigError for a choice that belongs to the other kind."""
    if spec.betas is None:
        if choices.top:
            raise ConfigError(f"top is {choices.top}, but {spec.id} is a flow-matching model; set shift instead")
        return Flow(choices.shift or spec.at(*picture_size(spec, choices)).shift)
    if choices.shift:
        raise ConfigError(f"shift is {choices.shift}, but {spec.id} has a variance-preserving process; set top instead")
    prediction = cast(Literal["epsilon", "v"], spec.prediction)  # the spec has checked it
    return Diffusion(spec.betas.alphas(), prediction=prediction, top=choices.top or int(spec.times[0]) + 1)


def starting_adapter(spec: ModelSpec, network: nn.Module) -> Lora | None:
    """The adapter that training goes on from, of several the sum: any format, checked against the network."""
    return read_adapters(spec.adapters, base_of(network, str(spec.base)))


def adapted(network: nn.Module, choices: Choices, adapter: Lora | None, usual: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears that adapters go on, by name and in the network's order.

    They are those that the run chose, or that the adapter to go on from has, or that are `usual` for the family.
    Raises ConfigError where there are none, and for an adapter on convolutions, which are not trained.
    """
    base = base_of(network, "the network")
    wanted = choices.targets or (tuple(adapter.modules) if adapter else tuple(usual))
    names = base.targeted(wanted)
    modules = {name: network.get_submodule(name) for name in names}
    if adapter is not None and (
        odd := [n for n in adapter.modules if not isinstance(network.get_submodule(n), nn.Linear)]
    ):
        raise ConfigError(f"adapter {adapter.source} changes the convolution {odd[0]}; only linear layers are trained")
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    if not linears:
        raise ConfigError(f"targets {', '.join(wanted)} name no linear layer of {base.class_name}")
    return linears


def no_prompts(name: str) -> ConfigError:
    """For a checkpoint of no world that has prompts of its own."""
    return ConfigError(f"{name} has no world of its own to take prompts from; give a file with --prompts")
