"""Generator, fake score and teacher as different weights of one denoiser.

A role is a mapping from parameter names to tensors that `torch.func.functional_call` puts in place of the base's, so
all roles share one module and one set of frozen weights. A LoRA role merges W + alpha / r * B A once per call: for
matrices of a few hundred rows that costs less than two extra products per layer and token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tdm_serve.models.adapters import METADATA_KEY, PREFIX
from tdm_serve.models.families.zimage_denoiser import ZImageDenoiser

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class Target:
    """One linear that adapters change: its names in the denoiser and in diffusers' transformer, and its weight."""

    denoiser_name: str
    transformer_name: str
    weight: Tensor


def targets(transformer: ZImageTransformer2DModel, denoiser: ZImageDenoiser) -> list[Target]:
    """Every projection of attention and feed-forward, in a fixed order."""
    names = {id(parameter): name for name, parameter in denoiser.named_parameters()}
    found: list[Target] = []
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            found.append(Target(names[id(module.weight)], name, module.weight))
    return found


class Lora:
    """Low-rank update of every target; equal to the base until trained (B starts at zero)."""

    def __init__(self, where: list[Target], rank: int, alpha: float, generator: torch.Generator) -> None:
        self.where, self.rank, self.alpha = where, rank, alpha
        self.a = [torch.randn(rank, t.weight.shape[1], generator=generator) / rank for t in where]
        self.b = [torch.zeros(t.weight.shape[0], rank) for t in where]
        self.parameters = [tensor.requires_grad_() for tensor in (*self.a, *self.b)]

    def weights(self) -> dict[str, Tensor]:
        """Denoiser parameter name -> tensor, with gradients to `parameters`."""
        scale = self.alpha / self.rank
        return {
            t.denoiser_name: torch.addmm(t.weight, b, a, alpha=scale)
            for t, a, b in zip(self.where, self.a, self.b, strict=True)
        }

    def save(self, path: Path) -> None:
        """Writes the adapter in bfloat16 as diffusers' `load_lora_weights` reads it, alpha in the metadata."""
        tensors: dict[str, Tensor] = {}
        for t, a, b in zip(self.where, self.a, self.b, strict=True):
            tensors[f"{PREFIX}{t.transformer_name}.lora_A.weight"] = a.detach().to(torch.bfloat16)
            tensors[f"{PREFIX}{t.transformer_name}.lora_B.weight"] = b.detach().to(torch.bfloat16)
        settings = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": list(TARGETS)}
        described = json.dumps({PREFIX + key: value for key, value in settings.items()}, sort_keys=True)
        save_file(tensors, path, metadata={"format": "pt", METADATA_KEY: described})


class VelocityNet(nn.Module):
    """Text refinement, modulation and denoising as one module, so that one functional call covers all of them."""

    def __init__(self, denoiser: ZImageDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and levels (B,), for text (B, L, D) of `lengths` (B,)."""
        denoiser = self.denoiser
        return denoiser(latents, denoiser.modulation(sigma), denoiser.refine_text(text, lengths))

    def acting_as(self, weights: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        """This network with a role's weights in place; the result is float32 whatever autocast does inside."""
        replaced = {f"denoiser.{name}": tensor for name, tensor in weights.items()}

        def velocity(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(self, replaced, inputs).float()

        return velocity
