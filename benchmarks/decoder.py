"""Does channels-last pay in the autoencoder's decoder, and what do tiles change? On this machine, layouts in turn.

`--vae default` is the embedded checkpoint's; the others are published shapes with random weights. Both layouts must
give the same picture, to rounding, before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tdm_serve.models.architectures import parts
from tdm_serve.models.autoencoder import decode, tile
from tdm_serve.models.entries import EMBEDDED
from tdm_serve.models.load import pick_device, pick_dtype
from tdm_serve.models.placement import placement_on
from tdm_serve.models.random_weights import build

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative, of the whole picture


def load(name: str, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    if name == "default":
        return placement_on(device, dtype).part(AutoencoderKL, EMBEDDED / "vae", device)
    with tempfile.TemporaryDirectory() as scratch:
        parts()[name].write(Path(scratch) / "vae", tiny=False)
        return build(AutoencoderKL, Path(scratch) / "vae", device, dtype)


def laid(vae: AutoencoderKL, layout: Any) -> AutoencoderKL:
    made = copy.deepcopy(vae)
    nn.Module.to(made, memory_format=layout)
    return made


@torch.inference_mode()
def picture(vae: AutoencoderKL, latents: Tensor, layout: Any) -> Tensor:
    return decode(vae, latents.contiguous(memory_format=layout))


def timed(vae: AutoencoderKL, latents: Tensor, layout: Any, _index: int) -> Mapping[str, float]:
    started = time.perf_counter()
    picture(vae, latents, layout)
    if latents.is_cuda:
        torch.cuda.synchronize()
    return {"total": (time.perf_counter() - started) * 1000}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", default="default", choices=("default", "flux-vae", "sd3-vae", "sd15-vae"))
    parser.add_argument("--size", type=int, default=128, help="side of the picture in pixels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--tile", type=int, default=0, help="also compare with tiles of this side")
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/decoder.jsonl")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    vae = load(args.vae, device, dtype)
    side = args.size // 2 ** (len(vae.config["block_out_channels"]) - 1)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(1, vae.config["latent_channels"], side, side, generator=generator).to(device, dtype)
    made = {name: laid(vae, layout) for name, layout in LAYOUTS.items()}
    pictures = {name: picture(made[name], latents, layout) for name, layout in LAYOUTS.items()}
    difference = error(pictures["channels-last"], pictures["contiguous"])
    if not difference <= TOLERANCE[dtype]:
        raise SystemExit(f"the layouts' pictures differ by {difference:.2g}, so no timing is published")
    contenders = {name: partial(timed, made[name], latents, layout) for name, layout in LAYOUTS.items()}
    measured = harness.interleaved(contenders, warmup=args.warmup, repeats=args.repeats)
    row: dict[str, Any] = {
        "vae": args.vae,
        "size": f"{args.size}x{args.size}",
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": args.repeats,
        "relative_difference": difference,
        "milliseconds": {name: harness.summarise(rounds)["total"] for name, rounds in measured.items()},
        "contiguous_over_channels_last": harness.ratio(measured["contiguous"], measured["channels-last"]),
    }
    if args.tile:
        tile(made["channels-last"], args.tile)
        in_tiles = picture(made["channels-last"], latents, torch.channels_last)
        row["tile_px"], row["tile_relative_difference"] = args.tile, error(in_tiles, pictures["channels-last"])
    for name, values in row["milliseconds"].items():
        print(f"{name:<15}" + "".join(f"{p} {v:>9.2f} ms  " for p, v in values.items()))
    print(f"contiguous / channels-last, round by round: {row['contiguous_over_channels_last']}")
    harness.publish("decoder", row, keep=args.keep)


if __name__ == "__main__":
    main()
