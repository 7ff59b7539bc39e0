"""Where benchmarks/kernel_speed.py runs: the shapes of the models on a GPU, or small ones in Triton's interpreter.

The second measures nothing: it is there so that every case, check and table has run before there is a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gpu_timing
import harness
import torch

from tdm_kernels.dispatch import interpreted

BATCHES = (1, 2, 4, 8)  # a table's row reaches to twice and half of its batch, so 1 and 4 are enough for all
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Model:
    """Heads, their dimension, and (image, text) tokens of the attention of a model."""

    name: str
    heads: int
    head_dim: int
    tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """`clock` gives p20, p50, p80 of calls by name in milliseconds; `pictures` are channels and sides of a decoder."""

    device: str
    dtype: torch.dtype
    name: str
    capability: tuple[int, int]
    clock: Callable[[dict[str, Call]], dict[str, dict[str, float]]]
    compiler: str = "inductor"
    models: tuple[Model, ...] = (
        Model("z-image", 30, 128, ((1024, 32), (1024, 512), (4096, 32), (4096, 512))),
        Model("sd3.5-medium", 24, 64, ((1024, 333), (4096, 333))),
        Model("sd1.5", 8, 40, ((4096, 0),)),
    )
    batches: tuple[int, ...] = BATCHES
    pictures: tuple[tuple[int, int], ...] = ((512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024))
    heads: int = 30  # of norms with rotation
    tokens: tuple[int, ...] = (1056, 4128, 4608)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend=self.compiler)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def on_gpu() -> Setting:
    """Raises SystemExit where torch finds none."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernel_speed.py measures kernels on an NVIDIA GPU, and torch finds none here")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return Setting("cuda", torch.bfloat16, name, capability, gpu_timing.milliseconds)


def smoke() -> Setting:
    """As a card of 9.0 would run it. Raises SystemExit where kernels would not be interpreted."""
    if not interpreted():
        raise SystemExit("--smoke runs the kernels in Triton's interpreter; set TRITON_INTERPRET=1")
    whole = Setting("cpu", torch.bfloat16, "interpreter", (9, 0), once, compiler="eager")
    models = tuple(replace(model, heads=2, tokens=((64, 26 if model.tokens[0][1] else 0),)) for model in whole.models)
    return replace(whole, models=models, batches=(2,), pictures=((128, 9), (96, 8)), heads=3, tokens=(70,))


def once(calls: dict[str, Call]) -> dict[str, dict[str, float]]:
    """One run of each."""
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        found[name] = harness.percentiles([(time.perf_counter() - started) * 1000])
    return found


def ceilings(setting: Setting) -> dict[str, float]:
    """What the card does at best; ones where nothing is measured."""
    return gpu_timing.ceilings() if setting.device == "cuda" else {"matmul_tflops": 1.0, "copy_gbps": 1.0}
