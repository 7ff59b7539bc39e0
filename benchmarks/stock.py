"""Stock diffusers with the weights of a model of ours: loaded, called for the same pictures, timed and counted."""

from __future__ import annotations

import inspect
import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from tdm_serve.convert import convert
from tdm_serve.core import Request
from tdm_serve.models.families.base import Family
from tdm_serve.models.families.table import FAMILIES, read_index
from tdm_serve.models.families.zimage_denoiser import padded_length
from tdm_serve.models.folders import network_of
from tdm_serve.models.random_weights import build, random_specs
from tdm_serve.models.spec import MANIFEST, ModelSpec
from tdm_serve.stock_call import StockCall, stock_call


@dataclass
class Stock:
    """A stock pipeline. Noise comes from our model, so that types in which it is drawn make no difference."""

    pipe: Any
    model: Family
    calls: dict[tuple[int, int], StockCall] = field(default_factory=dict[tuple[int, int], StockCall])  # by size
    stages: dict[str, float] = field(default_factory=dict[str, float])
    evaluations: int = 0  # of single pictures, counted at the network

    @property
    def network(self) -> Any:
        return getattr(self.pipe, network_of(self.model.spec.family))

    def watch(self) -> Stock:
        """Times the stages and counts the calls from now on."""
        self.pipe.set_progress_bar_config(disable=True)
        self.network.register_forward_pre_hook(self._count, with_kwargs=True)
        for owner, method, stage in (
            (self.pipe, "encode_prompt", "text"),
            (self.network, "forward", "denoise"),
            (self.pipe.vae, "decode", "decode"),
        ):
            setattr(owner, method, self._timed(getattr(owner, method), stage))
        return self

    def _count(self, _: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Z-Image's network takes a list of pictures, the others a tensor; a guidance pair is two."""
        self.evaluations += len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample", ())))

    def _timed(self, inner: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.stages[stage] = self.stages.get(stage, 0.0) + (self.now() - started) * 1000

        return timed

    def now(self) -> float:
        """Seconds, after the device has done what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def pictures(self, requests: Sequence[Request]) -> list[Image.Image]:
        """Of requests of one size."""
        first = requests[0]
        noise = torch.cat([self.model.noise(one.seed, one.width, one.height) for one in requests])
        called = self.called(first.width, first.height)
        self.pipe.scheduler = called.scheduler
        asked = called.arguments | {"width": first.width, "height": first.height, "latents": noise}
        if self.model.spec.family == "zimage":  # whose latents stay in float32
            asked["max_sequence_length"] = padded_length(self.model.spec.max_prompt_tokens)
        else:
            asked["latents"] = noise.to(self.model.dtype)
        return self.pipe(prompt=[one.prompt for one in requests], **asked).images

    def called(self, width: int, height: int) -> StockCall:
        """A version may have a schedule of its own for a size."""
        if (width, height) not in self.calls:
            self.calls[width, height] = stock_call(self.model.spec.at(width, height))
        return self.calls[width, height]

    def round(self, requests: Sequence[Request]) -> dict[str, float]:
        """Milliseconds by stage of one batch, prompts to PNG."""
        self.stages.clear()
        started = self.now()
        images = self.pictures(requests)
        made = self.now()
        for image in images:
            image.save(io.BytesIO(), format="PNG")
        ended = self.now()
        return {**self.stages, "png": (ended - made) * 1000, "total": (ended - started) * 1000}


def load_stock(reference: str, model: Family, *, random: bool) -> Stock:
    """Stock's pipeline of `reference`, with weights equal to those of `model`, on its device and in its type."""
    if random:
        with random_specs([reference]) as [spec]:
            return Stock(drawn(spec, model), model).watch()
    with tempfile.TemporaryDirectory() as scratch:
        return Stock(converted(reference, Path(scratch) / "plain", model), model).watch()


def converted(reference: str, folder: Path, model: Family) -> Any:
    """By way of `tdm-serve convert`, whose manifest says how stock is loaded."""
    manifest = json.loads((convert(reference, folder) / MANIFEST).read_text())
    said = manifest["versions"][manifest["default"]]["stock"]
    kind = getattr(diffusers, FAMILIES[manifest["family"]].pipeline)
    return kind.from_pretrained(folder, dtype=model.dtype, **said["load"]).to(model.device)


def drawn(spec: ModelSpec, model: Family) -> Any:
    """From configurations: equal ones give equal weights."""
    kind: Any = getattr(diffusers, FAMILIES[spec.family].pipeline)
    parts: dict[str, Any] = {}
    for name, value in read_index(spec.base).items():
        if isinstance(value, list):
            parts[name] = part(spec.base / name, *value, model) if value[0] else None
    known = inspect.signature(kind.__init__).parameters
    for name in set(known) - {*parts, "self"}:
        parts[name] = {"scheduler": stock_call(spec).scheduler, "requires_safety_checker": False}.get(name)
    return kind(**{name: value for name, value in parts.items() if name in known})


def part(folder: Path, library: str, name: str, model: Family) -> Any:
    """A tokenizer from its files, a network with random weights."""
    kind = getattr(import_module(library), name)
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder)
    return build(kind, folder, model.device, model.dtype)
