"""Trains the picture autoencoder: an 8x `AutoencoderKL` on rendered scenes.

Scenes are mostly background, so object pixels weigh more. Noise on the latents while training the decoder makes it
forgiving: a generator's latents are never exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tdm_finetune.data import examples, to_tensor
from tdm_finetune.run import Run, cosine, seed_everything
from tdm_finetune.scenes.render import Pixels
from tdm_finetune.scenes.world import BACKGROUND, SIZE
from tdm_serve.config import at_least, multiple_of, positive
from tdm_serve.models.autoencoder import decode, posterior

logger = logging.getLogger(__name__)

LEVELS = 4  # of resolution, each half the one before
FACTOR = 2 ** (LEVELS - 1)
GROUPS = 8  # of every GroupNorm


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """`tdm-serve finetune vae`."""

    run: Path = Path("runs/vae")
    seed: int = 0
    steps: int = 2400
    batch: int = 32
    crop: int = 64  # pixels a side; convolutions generalise to whole pictures, and a crop holds more object pixels
    learning_rate: float = 2e-3
    warmup: int = 100
    kl_weight: float = 1e-3
    latent_noise: float = 0.1  # standard deviation, in latent units
    object_weight: float = 4.0  # extra weight of non-background pixels
    save_every: int = 400
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (16, 32, 64, 96)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "save_every", "latent_channels")
        at_least(self, 0, "warmup", "kl_weight", "latent_noise", "object_weight")
        positive(self, "learning_rate")
        multiple_of(self, FACTOR, "crop")
        if self.crop > SIZE:
            raise ValueError(f"crop is {self.crop}; pictures have {SIZE} pixels a side")
        if len(self.block_channels) != LEVELS or any(c < GROUPS or c % GROUPS for c in self.block_channels):
            raise ValueError(f"block_channels is {self.block_channels}; it must be {LEVELS} multiples of {GROUPS}")


def build(config: VaeConfig) -> AutoencoderKL:
    """A small 8x autoencoder without attention; GroupNorm in groups of at least two channels."""
    blocks = len(config.block_channels)
    make = cast(Callable[..., AutoencoderKL], AutoencoderKL)  # its signature declares tuples of length one
    return make(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=GROUPS,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def loss_terms(vae: AutoencoderKL, pictures: Tensor, config: VaeConfig) -> tuple[Tensor, Tensor]:
    """(weighted reconstruction error, KL to the unit Gaussian per latent element) for pictures (B, 3, H, W)."""
    encoded = posterior(vae, pictures)
    latents = encoded.sample()
    latents = latents + config.latent_noise * torch.randn_like(latents)
    decoded = decode(vae, latents).float()
    background = pictures.new_tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1.0
    weight = 1.0 + config.object_weight * ((pictures - background).abs().amax(1, keepdim=True) > 0.1)
    error = (decoded - pictures).abs() + 2.0 * (decoded - pictures).square()
    return (weight * error).mean(), encoded.kl().mean() / latents[0].numel()


def batches(config: VaeConfig, skip: int) -> Iterator[Tensor]:
    """Crops (B, 3, crop, crop) around objects, starting `skip` batches into the stream."""
    stream = (
        crop_around_object(picture, config.crop, index) for index, (_, picture) in enumerate(examples(config.seed))
    )
    next(islice(stream, skip * config.batch, skip * config.batch), None)
    while True:
        yield to_tensor(list(islice(stream, config.batch)))


def crop_around_object(picture: Pixels, side: int, index: int) -> Pixels:
    """A window that holds a random object pixel; its offset follows from `index` alone, so that a resume repeats it."""
    rng = np.random.default_rng(index)
    rows, columns = np.nonzero((picture != picture[0, 0]).any(-1))
    chosen = rng.integers(len(rows))
    limit = picture.shape[0] - side
    top, left = (int(np.clip(centre[chosen] - rng.integers(side), 0, limit)) for centre in (rows, columns))
    return picture[top : top + side, left : left + side]


def train(config: VaeConfig) -> Path:
    """Trains, or resumes, and writes a diffusers folder to `run/vae`; returns it."""
    seed_everything(config.seed)
    vae = build(config)
    optimizer = torch.optim.AdamW(vae.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(config.run, config, total_steps=config.steps)
    if (state := run.resume()) is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for pictures in islice(batches(config, run.step), config.steps - run.step):
        run.advance(_step(vae, optimizer, pictures, config, run.step))
        if run.step % config.save_every == 0:
            run.save(model=vae.state_dict(), optimizer=optimizer.state_dict())
    run.close()
    return export(vae, config)


def _step(
    vae: AutoencoderKL, optimizer: torch.optim.Optimizer, pictures: Tensor, config: VaeConfig, step: int
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * cosine(step, config.steps, config.warmup)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, kl = loss_terms(vae, pictures, config)
    (reconstruction + config.kl_weight * kl).backward()
    norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"reconstruction": reconstruction.item(), "kl": kl.item(), "gradient_norm": float(norm)}


@torch.no_grad()
def export(vae: AutoencoderKL, config: VaeConfig) -> Path:
    """Measures the latents' mean and deviation, writes them into the config, saves in diffusers' layout."""
    vae.eval()
    stream = examples(config.seed + 1)
    latents = torch.cat([posterior(vae, p).mean for p in _pictures(stream, 16, 32)])
    shift, scale = latents.mean().item(), 1.0 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 6), scaling_factor=round(scale, 6))
    folder = config.run / "vae"
    vae.save_pretrained(folder)
    logger.info("saved %s (shift %.4f, scale %.4f)", folder, shift, scale)
    return folder


def _pictures(stream: Iterator[Any], count: int, batch: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield to_tensor([picture for _, picture in islice(stream, batch)])
