"""What the engine asks of a family: prompt -> conditioning, latents -> network output, latents -> picture.

Everything that a family does not say for itself is the same for all of them: the noise of a seed, the autoencoder's
pictures and the cheap previews. Prompts and pictures are handled one at a time unless a caller asks for them
`together`, because results would otherwise depend on the size of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tdm_serve.errors import InvalidRequest, PictureFailed, PromptTooLong
from tdm_serve.models.adapters import fuse_adapters, read_adapters
from tdm_serve.models.autoencoder import decode, laid_out, posterior, with_kernels
from tdm_serve.models.kernel_choice import check_quantised
from tdm_serve.models.lora import base_of
from tdm_serve.models.placement import Placement
from tdm_serve.models.quantise import to_fp8
from tdm_serve.models.routed import BASE, Routed, Variant
from tdm_serve.models.spec import ModelSpec
from tdm_serve.models.versions import Adapters, Versions
from tdm_serve.preview import Matrix, colour_blocks, fit
from tdm_serve.sampling import Row

M = TypeVar("M", bound=nn.Module)


class Family(ABC):
    """A loaded base with one or more versions. `denoiser`, set by the family, is what a backend replaces."""

    denoiser: Any  # an nn.Module; each family says which
    versions: Versions
    channels: int  # of the latents
    runtime = "eager"  # what runs the networks, unless a backend does
    patch = 1  # sides of latents are multiples of it
    longest: int | None = None  # side of latents, where the network has places for no more
    quantisable = False  # whether TDM_SERVE_ATTENTION=quantised is for it
    exact_on_cpu = True  # whether a CPU computes a picture bit by bit alike in any batch; convolutions do not

    def __init__(self, specs: Sequence[ModelSpec], placement: Placement, adapters: Adapters = "fused") -> None:
        """With one version its adapter is added to the base weights, unless `adapters` says "separate"; several share
        the base (`models.routed`).
        """
        self.spec, self.placement = specs[0], placement
        check_quantised(self.spec.family, self.quantisable)
        self.device, self.dtype, self.text_device = placement.device, placement.dtype, placement.text
        self.load_text()
        self.vae = self.load_vae()
        self.scale = float(self.vae.config["scaling_factor"])
        self.shift = float(self.vae.config.get("shift_factor") or 0.0)
        self.factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        self.load_denoiser(specs, adapters)
        self.preview = self.spec.preview or self._fit_preview()

    @abstractmethod
    def load_text(self) -> None:
        """Sets the tokenizers and text encoders."""

    @abstractmethod
    def load_denoiser(self, specs: Sequence[ModelSpec], adapters: Adapters) -> None:
        """Sets `denoiser`, `versions` and `channels`."""

    def load_vae(self) -> AutoencoderKL:
        return with_kernels(laid_out(self.placement.part(AutoencoderKL, self.spec.base / "vae", self.device)))

    def encoder(self, kind: type[M], name: str) -> M:
        """A text encoder of the base, on its device."""
        return self.placement.part(kind, self.spec.base / name, self.text_device)

    def ready(self, denoiser: M) -> M:
        """The denoiser with its adapters in it and packed, as it is wanted and on its device."""
        if self.placement.quantise == "none":
            return denoiser.to(self.device, self.dtype)
        return to_fp8(denoiser.to(self.dtype), self.spec.family, self.device)

    @abstractmethod
    def tokens(self, prompt: str, truncate: bool = False) -> list[int]:
        """A prompt as `encode` takes it; equal lists give equal text. Safe from any thread.

        With `truncate` one that is too long is cut as the stock pipeline cuts it.
        """

    @abstractmethod
    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, special ones included. Safe from any thread."""

    @abstractmethod
    def check_prompt(self, prompt: str, param: str = "prompt", truncate: bool = False) -> int:
        """The padded length of a prompt that can be read. Raises PromptTooLong, unless the prompt may be cut."""

    @abstractmethod
    def encode(self, prompts: Sequence[Sequence[int]], *, together: bool = False) -> list[Tensor]:
        """Text features, on `device`, of prompts as `tokens` gave them, for every version alike."""

    @abstractmethod
    def refine(self, features: Tensor, length: int, version: Variant = BASE) -> Tensor:
        """Text (1, length, D) ready for the denoiser, of one prompt's features."""

    def shared_length(self, length: int, width: int, height: int) -> int:  # noqa: ARG002
        """The text length of the forwards that a prompt of a padded length shares with others, where lengths mix.

        Width and height of the picture, in pixels, say how much a longer text costs.
        """
        return length

    def joined(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Refined texts as one batch (B, L, D), and their own lengths (B,) int32 where these differ."""
        return torch.cat(list(texts)), None

    @abstractmethod
    def timed(self, row: Row, text: Tensor, version: Variant = BASE) -> Tensor:
        """What the denoiser wants beside latents and text (1, L, D) at one step: (1, M, D)."""

    def check_size(self, width: int, height: int) -> None:
        """Raises InvalidRequest for a size, in pixels, that the network cannot make. Safe from any thread."""
        multiple = self.factor * self.patch
        for side, name in ((width, "width"), (height, "height")):
            if side % multiple or (self.longest is not None and side > self.longest * self.factor):
                most = "" if self.longest is None else f" up to {self.longest * self.factor}"
                raise InvalidRequest(
                    f"size {width}x{height} has a {name} of {side}; this checkpoint's network makes multiples of "
                    f"{multiple}{most}",
                    param="size",
                )

    def noise(self, seed: int, width: int, height: int) -> Tensor:
        """A seed's initial latents (1, C, H / 8, W / 8): what diffusers draws on the CPU in float32."""
        shape = (1, self.channels, height // self.factor, width // self.factor)
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device)

    def decode(self, latents: Sequence[Tensor], *, together: bool = False) -> Tensor:
        """uint8 pictures (B, H, W, 3) on the CPU, of clean latents (1, C, h, w) each. Raises PictureFailed."""
        batch = torch.cat(list(latents)).contiguous(memory_format=torch.channels_last)
        raw = batch.to(self.dtype) / self.scale + self.shift
        decoded = torch.cat([decode(self.vae, part) for part in raw.split(len(raw) if together else 1)]).float()
        if not bool(decoded.isfinite().all()):
            raise PictureFailed("the autoencoder decoded latents to pixels that are no numbers")
        # the steps of diffusers' image processor, so that rounding agrees
        pictures = (decoded * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pictures.permute(0, 2, 3, 1).cpu()

    @torch.inference_mode()
    def _fit_preview(self) -> Matrix:
        """For a checkpoint that brings no matrix of its own."""
        pictures = colour_blocks()
        sent = (pictures / 127.5 - 1.0).to(self.device, self.dtype)
        latents = torch.cat([posterior(self.vae, picture).mean for picture in sent.split(1)])
        return fit((latents.float() - self.shift) * self.scale, pictures.to(self.device))


def too_long(param: str, why: str) -> PromptTooLong:
    """The refusal of a prompt that would not be read to its end; `why` goes on from "it has"."""
    return PromptTooLong(
        f"the {param.replace('_', ' ')} is too long: it has {why}; shorten it, or set truncate_prompt "
        "(--truncate-prompt) to have its end cut off",
        param=param,
    )


class Shareable(Protocol):
    """A denoiser whose linears several versions can share."""

    def share(self, names: Mapping[nn.Module, str], wanted: Collection[str]) -> dict[str, Routed]: ...


def with_versions(denoiser: Shareable, network: nn.Module, specs: Sequence[ModelSpec], adapters: Adapters) -> Versions:
    """A single version's adapters go into the weights of `network`, unless they are wanted separate; what several
    change is made ready to be shared. Comes before packing.
    """
    if len(specs) == 1 and adapters == "fused":
        return fused_version(network, specs[0], adapters)
    base = base_of(network, str(specs[0].base))
    versions = {spec.id: spec.adapters for spec in specs}
    loras = (read_adapters(own, base) for own in versions.values())
    wanted = {name for lora in loras if lora is not None for name in lora.modules}
    shared = denoiser.share({module: name for name, module in network.named_modules()}, wanted)
    return Versions(base, shared, versions, adapters)


def fused_version(network: nn.Module, spec: ModelSpec, adapters: Adapters) -> Versions:
    """A single version, whose adapters are added to the weights of `network`."""
    fuse_adapters(network, spec.adapters, str(spec.base))
    return Versions(base_of(network, str(spec.base)), {}, {spec.id: ()}, adapters)
