"""A device without a network: deterministic colours for pictures, faults by prompt or on demand, and a log of calls."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape
from tdm_serve.errors import CheckpointError, InvalidRequest, PictureFailed, PromptTooLong, UnknownModel

BAD = {stage: f"bad {stage}" for stage in ("start", "step", "finish")}  # prompts that raise in a stage
NAN = "nan"  # a prompt whose latents become no numbers
SHORT = 40  # characters of a prompt of 32 tokens


class OutOfToyMemory(Exception):
    """What this device raises when it is full."""


def info(name: str, steps: int) -> ModelInfo:
    sigmas = tuple(1.0 - index / steps for index in range(steps))
    return ModelInfo(name, "toy", f"hash-{name}", steps, sigmas, 1.0, 64, 64, 16, 32, 128, 64)


@dataclass(slots=True, eq=False, weakref_slot=True)
class ToySample:
    request: Request
    rows: tuple[float, ...]
    clean: float | None = None
    index: int = 0
    nfe: int = 0


@dataclass
class ToyCache:
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    known: set[str] = field(default_factory=set)


def _well(stage: str, batch: int) -> None:
    """Nothing goes wrong."""


class ToyDevice:
    """`trip` is called with (stage, batch) before every call; what it raises is the device's failure."""

    def __init__(self, *, call_s: float = 0.0, steps: Mapping[str, int] | None = None) -> None:
        self.infos = {name: info(name, count) for name, count in (steps or {"toy": 4, "toy-long": 6}).items()}
        self.cache = ToyCache()
        self.call_s = call_s
        self.fits: dict[str, int] = {}  # stage -> largest batch in memory
        self.trip: Callable[[str, int], None] = _well
        self.gate = threading.Event()  # steps wait for it
        self.gate.set()
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.threads: set[str] = set()
        self.preview_threads: set[str] = set()
        self.live: weakref.WeakSet[ToySample] = weakref.WeakSet()
        self.emptied = 0
        self._busy = threading.Lock()

    def examine(self, reference: str) -> ModelInfo:
        """A toy version's reference is its name and its steps: "toy-new:3"."""
        name, _, steps = reference.partition(":")
        if not steps.isdecimal():
            raise CheckpointError(f"{reference!r} is no toy")
        return info(name, int(steps))

    def add(self, served: ModelInfo) -> ModelInfo:
        self.threads.add(threading.current_thread().name)
        self.trip("add", 1)
        self.infos = {**self.infos, served.id: served}
        return served

    def check(self, request: Request) -> Shape:
        if request.model and request.model not in self.infos:
            raise UnknownModel(f"model {request.model!r} is not served; allowed: {', '.join(self.infos)}")
        if not request.prompt.strip():
            raise InvalidRequest("the prompt is empty", param="prompt")
        text = 32 if len(request.prompt) < SHORT else 64
        if len(request.prompt) > 2 * SHORT:
            raise PromptTooLong("the prompt is too long", param="prompt")
        return Shape(request.width, request.height, text, request.guidance not in (None, 1.0))

    def look(self, request: Request) -> tuple[Shape, bool]:
        return self.check(request), request.prompt in self.cache.known

    def start(self, requests: Sequence[Request]) -> list[ToySample]:
        with self._call("start", requests):
            for prompt in {request.prompt for request in requests}:
                self.cache.misses += prompt not in self.cache.known
                self.cache.hits += prompt in self.cache.known
                self.cache.known.add(prompt)
            samples = [ToySample(request, self._rows(request)) for request in requests]
            self.live.update(samples)
            return samples

    def _rows(self, request: Request) -> tuple[float, ...]:
        sigmas = self.infos[request.model or next(iter(self.infos))].sigmas
        return sigmas if request.steps is None else tuple(float(index) for index in range(request.steps))

    def step(self, samples: Sequence[ToySample]) -> None:
        assert self.gate.wait(10), "the test never opened the gate"
        with self._call("step", [sample.request for sample in samples]):
            assert len({self.check(sample.request) for sample in samples}) == 1
            for sample in samples:
                assert sample.index < len(sample.rows)
                sample.clean = float("nan") if NAN in sample.request.prompt else float(sample.request.seed)
                sample.index += 1
                sample.nfe += 1

    def finish(self, samples: Sequence[ToySample]) -> list[GeneratedImage]:
        with self._call("finish", [sample.request for sample in samples]):
            if faulty := [index for index, sample in enumerate(samples) if sample.clean != sample.clean]:
                raise PictureFailed(f"pictures {faulty} are no numbers")
            return [self._picture(sample) for sample in samples]

    def _picture(self, sample: ToySample) -> GeneratedImage:
        asked = sample.request
        model = asked.model or next(iter(self.infos))
        picture = Image.new("RGB", (1, 1), colour_of(asked))
        shown = asked.prompt, asked.seed, asked.width, asked.height, sample.nfe, sample.rows, 1.0, model
        return GeneratedImage(picture, *shown, self.infos[model].checkpoint_hash)

    def preview(self, latents: float) -> Image.Image:
        self.preview_threads.add(threading.current_thread().name)
        return Image.new("RGB", (1, 1), (int(latents) % 256, 0, 0))

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, OutOfToyMemory)

    def empty_cache(self) -> None:
        self.emptied += 1

    def _call(self, stage: str, requests: Sequence[Request]) -> threading.Lock:
        """Fails as it was told to, before anything has changed; the lock shows that one thread owns the device."""
        assert not self._busy.locked(), "two calls at once"
        self.threads.add(threading.current_thread().name)
        self.calls.append((stage, tuple(request.prompt for request in requests)))
        time.sleep(self.call_s)
        self.trip(stage, len(requests))
        if len(requests) > self.fits.get(stage, len(requests)):
            raise OutOfToyMemory(f"{len(requests)} are too many")
        if any(BAD[stage] in request.prompt for request in requests):
            raise ValueError(f"the {stage} fails")
        return self._busy

    def batches(self, stage: str, *prompts: str) -> list[int]:
        """Sizes of the calls of a stage in which there was one of the prompts."""
        return [len(called) for name, called in self.calls if name == stage and set(prompts) & set(called)]

    def count(self) -> Counter[str]:
        return Counter(stage for stage, _ in self.calls)


class SlowStart(ToyDevice):
    """Its warm-up goes on when the test says so; nothing else is slow."""

    def __init__(self) -> None:
        super().__init__(call_s=0.0005)
        self.warm = threading.Event()
        self.trip = lambda _stage, _batch: self._wait()

    def _wait(self) -> None:
        assert self.warm.wait(60), "the test never let it warm up"


def colour_of(request: Request) -> tuple[int, int, int]:
    """What a picture of a request must look like, whatever its company."""
    return request.seed % 256, len(request.prompt), request.steps or 0


def asked(prompt: str = "a star", seed: int = 0, **others: Any) -> Request:
    return Request(prompt, seed, others.pop("width", 64), others.pop("height", 64), **others)


def is_right(image: GeneratedImage, request: Request) -> bool:
    return image.image.getpixel((0, 0)) == colour_of(request) and image.prompt == request.prompt
