"""`Pipeline.from_pretrained("default")("two red circles")`: the SDK in one class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Unpack

from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape, StepCallback
from tdm_serve.engine import Engine
from tdm_serve.errors import InvalidRequest
from tdm_serve.models.load import MemoryOptions
from tdm_serve.validation import check_count, parse_size, seeds_for


class Pipeline:
    """A loaded model that turns prompts into pictures, synchronously."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info: ModelInfo = engine.info

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Sequence[str | Path] = "default",
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        adapters: str = "fused",
        engine: Path | None = None,
        **memory: Unpack[MemoryOptions],
    ) -> Pipeline:
        """Loads a catalogue id, a checkpoint folder, or one version of it as FOLDER@VERSION.

        Several versions of one base share its weights; the first is the default of a call. device is auto, cpu, cuda or
        cuda:N; dtype is auto, float32, bfloat16 or float16; backend is auto, eager or compiled, or that of an exported
        engine; adapters is fused (fast) or separate, which lets a call have its adapter weaker or stronger; `engine` is
        a folder that `tdm-serve export` has written from the model; `memory` are offload ("text" keeps text encoders on
        the host), quantise ("fp8"), max_memory_gb and random_weights. `Engine.load` has more settings. Raises
        UnknownModel, CheckpointError, ConfigError or BackendUnavailable.
        """
        return cls(
            Engine.load(model, device=device, dtype=dtype, backend=backend, adapters=adapters, engine=engine, **memory)
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        size: str | tuple[int, int] | None = None,
        n: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        model: str = "",
        allow_untrained_schedule: bool = False,
        truncate_prompt: bool = False,
        adapter_scale: float | None = None,
        callback: StepCallback | None = None,
    ) -> list[GeneratedImage]:
        """`n` pictures for every prompt, prompt by prompt. `Request` says more of its settings.

        `seed` is the first picture's; the next ones get seed + 1, ... whatever the prompt. A sequence gives one seed
        per picture; None draws a random start. `size` is (width, height) in pixels or "WIDTHxHEIGHT". `model` chooses
        one of several loaded versions. `callback` gets a StepEvent after every step. Raises InvalidRequest with the
        offending parameter's name.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InvalidRequest("the list of prompts is empty", param="prompt")
        width, height = self._size(size)
        seeds = _seeds(seed, len(prompts), n)
        repeated = [text for text in prompts for _ in range(n)]
        requests = [
            Request(
                prompt=text,
                seed=one,
                width=width,
                height=height,
                steps=steps,
                guidance=guidance,
                negative_prompt=negative_prompt,
                model=model,
                allow_untrained_schedule=allow_untrained_schedule,
                truncate_prompt=truncate_prompt,
                adapter_scale=adapter_scale,
            )
            for text, one in zip(repeated, seeds, strict=True)
        ]
        return self.generate(requests, callback)

    def _size(self, size: str | tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            return self.info.width, self.info.height
        return parse_size(size) if isinstance(size, str) else size

    def check(self, request: Request) -> Shape:
        """What pictures must share to share a forward. Raises InvalidRequest for what cannot be made as asked."""
        return self.engine.check(request)

    def generate(self, requests: Sequence[Request], callback: StepCallback | None = None) -> list[GeneratedImage]:
        """The pictures of all requests, in order. Those of one shape share forwards, whatever their steps and versions.

        A callback needs requests of one version, size, steps and guidance, because an event tells of all of them.
        """
        for request in requests:
            self.check(request)
        for one, other in pairwise(requests):
            if callback is not None and (batch_key(one), one.model) != (batch_key(other), other.model):
                raise InvalidRequest(
                    "with a callback, requests must agree in model, size, steps and guidance", param="size"
                )
        return self.engine.generate(requests, callback) if requests else []


def batch_key(request: Request) -> tuple[int, int, int | None, float | None]:
    """What requests must share to report their steps together."""
    return request.width, request.height, request.steps, request.guidance


def _seeds(seed: int | Sequence[int] | None, prompts: int, n: int) -> list[int]:
    """One seed per picture: consecutive from a start, or as listed."""
    if seed is None or isinstance(seed, int):
        return seeds_for(seed, n, prompts)
    check_count(n)
    if len(seed) != prompts * n:
        raise InvalidRequest(
            f"{len(seed)} seeds were given for {prompts * n} pictures ({prompts} prompts, n {n})", param="seed"
        )
    return list(seed)
