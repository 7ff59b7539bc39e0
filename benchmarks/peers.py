"""Who is timed beside each other by latency.py and fullsize.py: this project's engines and stock diffusers' settings.

A contender that cannot run here, or whose pictures are not those of the first, is absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stock import Stock

from tdm_serve.artifact import read_artifact
from tdm_serve.bench import timed_batch
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import TdmServeError

Round = Mapping[str, float]
Setting = Callable[[Stock], AbstractContextManager[None]]
# what rounding may change, of 255: (the largest, the mean). Random weights spread it: bfloat16 alone moves ours by 11
# to 15 in the mean, and pictures of other noise are 42 to 64 apart. That the code is the same is what float32 tells.
CLOSE = {"float32": (2, 2.0), "bfloat16": (255, 20.0), "float16": (255, 20.0), "fp8": (255, 30.0)}


@dataclass(frozen=True)
class Contender:
    """`pictures` and `round` (milliseconds by stage) are of a batch; `counted` are evaluations so far."""

    pictures: Callable[[Sequence[Request]], Sequence[Any]]
    round: Callable[[Sequence[Request]], Round]
    counted: Callable[[], int]


def ours(engine: Engine) -> Contender:
    def pictures(requests: Sequence[Request]) -> Sequence[Any]:
        return [image.image for image in engine.generate(requests)]

    return Contender(pictures, partial(timed_batch, engine), lambda: engine.denoise.evaluations)


def theirs(stock: Stock, setting: Setting) -> Contender:
    def pictures(requests: Sequence[Request]) -> Sequence[Any]:
        with setting(stock):
            return stock.pictures(requests)

    def timed(requests: Sequence[Request]) -> Round:
        with setting(stock):
            return stock.round(requests)

    return Contender(pictures, timed, lambda: stock.evaluations)


def exported(folders: Sequence[Path], reference: str, absent: dict[str, str]) -> dict[str, Contender]:
    """Engines that `tdm-serve export` wrote, by their runtime; those that cannot run go to `absent`."""
    found: dict[str, Contender] = {}
    for folder in folders:
        artifact = read_artifact(folder)
        name = "ONNX Runtime" if artifact.kind == "onnx" else artifact.kind
        name += "" if artifact.quantise == "none" else f" {artifact.quantise}"
        try:
            found[name] = ours(Engine.load(reference, engine=folder, cache_mb=0))
        except TdmServeError as error:
            absent[name] = str(error)
    return found


def of_stock(stock: Stock, wanted: Sequence[str], absent: dict[str, str]) -> dict[str, Contender]:
    """Stock's eager pipeline and what its users switch on. They share the weights; a setting holds for one call."""
    on_gpu = stock.model.device.type == "cuda"
    settings: dict[str, Setting] = {"diffusers": lambda _: nullcontext()}
    if "compile" in wanted:
        blocks = repeated(stock.network)
        if blocks:
            settings["diffusers + compile"] = compiled(blocks, {"fullgraph": True})
        else:
            absent["diffusers + compile"] = f"{type(stock.network).__name__} names no repeated blocks"
    if "autotune" in wanted:
        if on_gpu:
            options = {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}
            settings["diffusers + max-autotune"] = compiled([stock.network], options)
        else:
            absent["diffusers + max-autotune"] = "what it searches are matrix products for GPUs"
    if "cudnn" in wanted:
        if on_gpu:
            settings["diffusers + cuDNN"] = cudnn
        else:
            absent["diffusers + cuDNN"] = "cuDNN attention is for NVIDIA GPUs"
    return {name: theirs(stock, setting) for name, setting in settings.items()}


def repeated(network: Any) -> list[Any]:
    """What diffusers' `compile_repeated_blocks` compiles."""
    names = getattr(network, "_repeated_blocks", None) or ()
    return [module for module in network.modules() if type(module).__name__ in names]


def compiled(modules: Sequence[Any], options: dict[str, Any]) -> Setting:
    """`module.compile`, as `compile_repeated_blocks` calls it, that can be taken back between two calls."""
    for module in modules:
        module.compile(**options)
    calls = [module._compiled_call_impl for module in modules]  # noqa: SLF001 - torch has no other switch
    switch(modules, [None] * len(modules))

    @contextmanager
    def setting(_: Stock) -> Generator[None]:
        switch(modules, calls)
        try:
            yield
        finally:
            switch(modules, [None] * len(modules))

    return setting


def switch(modules: Sequence[Any], calls: Sequence[Any]) -> None:
    for module, call in zip(modules, calls, strict=True):
        module._compiled_call_impl = call  # noqa: SLF001 - see `compiled`


@contextmanager
def cudnn(stock: Stock) -> Generator[None]:
    """Named in the way that diffusers documents, and for networks that go to torch directly, by torch's own choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = hasattr(stock.network, "set_attention_backend")
    if named:
        stock.network.set_attention_backend("_native_cudnn")
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            yield
    finally:
        if named:
            stock.network.reset_attention_backend()


def differences(one: Sequence[Any], other: Sequence[Any]) -> tuple[int, float]:
    """Largest and mean difference in 8-bit values."""
    pairs = [
        np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)) for a, b in zip(one, other, strict=True)
    ]  # (H, W, 3) each
    return max(int(pair.max()) for pair in pairs), float(np.mean([pair.mean() for pair in pairs]))


def checked(
    contenders: Mapping[str, Contender],
    reference: str,
    requests: Sequence[Request],
    precision: str,
    absent: dict[str, str],
) -> tuple[dict[str, Contender], dict[str, tuple[int, float]], dict[str, int]]:
    """The contenders that make the pictures of `reference`; how far off they are; evaluations a picture, counted."""
    kept: dict[str, Contender] = {}
    off: dict[str, tuple[int, float]] = {}
    counted: dict[str, int] = {}
    wanted = contenders[reference].pictures(requests)
    largest, mean = CLOSE[precision]
    for name, contender in contenders.items():
        before = contender.counted()
        try:
            found = contender.pictures(requests)
        except Exception as error:  # noqa: BLE001 - a peer that cannot run here is a result of this benchmark
            absent[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            continue
        spent, off[name] = contender.counted() - before, differences(wanted, found)
        if off[name][0] > largest or off[name][1] > mean:
            absent[name] = f"its pictures differ by {off[name][0]} of 255, {off[name][1]:.2f} in the mean"
        elif spent % len(requests):
            absent[name] = f"{spent} evaluations were counted for {len(requests)} pictures"
        else:
            kept[name], counted[name] = contender, spent // len(requests)
    return kept, off, counted
