"""What a model costs on this machine, stage by stage: the measuring behind `tdm-serve bench`.

A size and batch is first made once and checked (pictures of the right size that are not one colour, evaluations counted
at the denoiser), and only then timed. Prompts are encoded anew every time. Nothing is compared with anything here: that
is what the repository's `benchmarks/` are for.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import OutOfDeviceMemory, PictureFailed
from tdm_serve.isolate import forget_frames

STAGES = ("text", "denoise", "decode", "png")
MIB = 2**20
PROMPT = "a red circle above two small blue squares"


@dataclass(frozen=True, slots=True)
class Row:
    """One size and batch. Milliseconds are of the whole batch, the median of the repeats; `total` is of these rounds,
    too, so it is not exactly the stages' sum. `memory_mb` is the peak; on a CPU the process's, which only grows.
    """

    width: int
    height: int
    batch: int
    nfe: int  # per picture, counted
    ms: Mapping[str, float]  # text, denoise, decode, png, total
    evaluation_ms: float  # one evaluation of the batch
    images_per_second: float
    memory_mb: float

    @property
    def shares(self) -> dict[str, float]:
        whole = sum(self.ms[stage] for stage in STAGES)
        return {stage: self.ms[stage] / whole for stage in STAGES}

    def as_json(self) -> dict[str, Any]:
        shares = {stage: round(share, 3) for stage, share in self.shares.items()}
        return asdict(self) | {"shares": shares}


def measure(engine: Engine, width: int, height: int, batch: int, repeats: int) -> Row | None:
    """One row; None where the batch does not fit the memory. Raises InvalidRequest for a size that cannot be made, and
    PictureFailed where the check before the timing fails.
    """
    try:
        _reset_peak(engine)
        _check(engine, _requests(width, height, batch, 0))
        rounds = [timed_batch(engine, _requests(width, height, batch, 1 + index)) for index in range(repeats)]
    except Exception as error:
        if not engine.out_of_memory(error):
            raise
        forget_frames(error)
        engine.empty_cache()
        return None
    ms = {stage: round(statistics.median(one[stage] for one in rounds), 2) for stage in (*STAGES, "total")}
    nfe = engine.info.nfe
    rate = round(batch * 1000 / ms["total"], 3)
    return Row(width, height, batch, nfe, ms, round(ms["denoise"] / nfe, 2), rate, round(peak_mb(engine), 1))


def _requests(width: int, height: int, batch: int, index: int) -> list[Request]:
    """Different prompts for different pictures and rounds, of one length."""
    return [Request(f"{index:03}{place:03} {PROMPT}", 100 * index + place, width, height) for place in range(batch)]


def _check(engine: Engine, requests: Sequence[Request]) -> None:
    """Makes the pictures once, which also warms up, and looks at them."""
    before = engine.denoise.evaluations
    images = engine.generate(requests)
    counted = engine.denoise.evaluations - before
    if counted != engine.info.nfe * len(images) or any(image.nfe != engine.info.nfe for image in images):
        raise PictureFailed(
            f"{counted} evaluations were counted for {len(images)} pictures of {engine.info.nfe}, so no time is told"
        )
    for image, request in zip(images, requests, strict=True):
        bands = cast(Sequence[tuple[int, int]], image.image.getextrema())
        flat = all(low == high for low, high in bands)  # the engine has looked at latents and decoded values
        if image.image.size != (request.width, request.height) or flat:
            raise PictureFailed(f"a picture of {image.image.size} came out in one colour, so no time is told")


def timed_batch(engine: Engine, requests: Sequence[Request]) -> dict[str, float]:
    """Milliseconds of each stage of one batch, from prompts to PNGs."""
    started = time.perf_counter()
    images = engine.generate(requests)
    made = time.perf_counter()
    for image in images:
        image.png()
    ended = time.perf_counter()
    stages = {name: images[0].timings_ms[name] for name in ("text", "denoise", "decode")}
    return stages | {"png": (ended - made) * 1000, "total": (ended - started) * 1000}


def output_of(engine: Engine, width: int, height: int) -> torch.Tensor:
    """The network's output at the first noise level, (1, C, h, w) in float32 on the CPU: what fp8 is judged by."""
    [sample] = engine.start([Request(PROMPT, 1, width, height)])
    noise, row = sample.latents.float().clone(), sample.row
    p, q = engine.model.spec.clean_shares(row.sigma)
    engine.step([sample])
    return ((sample.clean.float() - p * noise) / q).cpu()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, of all elements together."""
    return float((found - expected).norm() / expected.norm())


def held_mb(engine: Engine) -> float:
    """Memory now: allocated on a GPU, resident of the process on a CPU."""
    if engine.model.device.type == "cuda":
        return torch.cuda.memory_allocated(engine.model.device) / MIB
    return resident_mb()


def resident_mb() -> float:
    """Of this process, in physical memory; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB if statm.exists() else 0.0


def peak_mb(engine: Engine) -> float:
    """The most since `_reset_peak` on a GPU, and since the process began on a CPU."""
    if engine.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.model.device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _reset_peak(engine: Engine) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.model.device)


def advice(engine: Engine, rows: Iterable[Row]) -> str:
    """One sentence on where the time goes and what would change it, judged by the largest single picture."""
    known = list(rows)
    if not known:
        return "nothing fitted the memory: try a smaller size, or a bf16 dtype."
    row = max(known, key=lambda one: (one.width * one.height, -one.batch))
    stage, share = max(row.shares.items(), key=lambda pair: pair[1])
    others = [one for one in known if (one.width, one.height) == (row.width, row.height)]
    what = {
        "text": _of_text(engine),
        "denoise": _of_denoise(engine, row, others),
        "decode": _of_decode(engine),
        "png": "ask the service for WebP or JPEG (`output_format`)",
    }[stage]
    name = {"text": "reading the prompt", "denoise": "the network", "decode": "the autoencoder", "png": "PNG"}[stage]
    return f"at {row.width}x{row.height} {name} takes {share:.0%} of a picture: {what}."


def _of_text(engine: Engine) -> str:
    if engine.model.text_device != engine.model.device:
        return "text encoders run on the host; leave --offload text out where the device has room"
    return "prompts that repeat come from the cache, so only new ones pay this"


def _of_decode(engine: Engine) -> str:
    if engine.model.dtype == torch.float32 and engine.model.device.type == "cuda":
        return "try --dtype bfloat16; channels-last is on already"
    return "its convolutions are in channels-last already, so fewer pixels are what helps"


def _of_denoise(engine: Engine, row: Row, others: Sequence[Row]) -> str:
    best, most = max(others, key=lambda one: one.images_per_second), max(one.batch for one in others)
    if best.images_per_second > 1.15 * row.images_per_second:
        gain = best.images_per_second / row.images_per_second
        return f"batches of {best.batch} make {gain:.1f} times as many pictures a second"
    on_gpu = engine.model.device.type == "cuda"
    if on_gpu and isinstance(engine.denoise.denoise, torch.nn.Module):
        return "try --backend compiled"
    if on_gpu and engine.model.placement.quantise == "none":
        return "try --quantise fp8, on a GPU that has it"
    if most == 1:
        return "measure larger batches, with --batch"
    return f"batches of up to {most} do not help here, so fewer evaluations or pixels are what does"


def first_picture_ms(engine: Engine, width: int, height: int) -> float:
    """What a cold engine takes for a picture. Raises OutOfDeviceMemory where not even one fits."""
    started = time.perf_counter()
    try:
        engine.generate([Request(PROMPT, 0, width, height)])
    except Exception as error:
        if not engine.out_of_memory(error):
            raise
        raise OutOfDeviceMemory(
            f"a single picture of {width}x{height} does not fit beside the model; try a smaller --size, "
            "--dtype bfloat16, --offload text or --quantise fp8"
        ) from error
    return (time.perf_counter() - started) * 1000
