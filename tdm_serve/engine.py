"""The device side: start a batch, step it, finish it. Owns the model; knows nothing of queues or HTTP.

Every picture in a batch has its own place in its own sampler table, so a batch may hold pictures at different steps;
what they must share is the shape of latents and text, and whether guidance is on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from tdm_serve.backends import create
from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape, StepCallback, StepEvent
from tdm_serve.errors import PictureFailed, UnknownModel
from tdm_serve.models.catalog import evaluations
from tdm_serve.models.families.zimage import Conditioning
from tdm_serve.models.families.zimage_denoiser import padded_length
from tdm_serve.models.load import Loaded
from tdm_serve.nfe import CountedDenoiser
from tdm_serve.sampling import Row
from tdm_serve.validation import check_request


@dataclass(slots=True)
class Sample:
    """One picture under way."""

    request: Request
    rows: tuple[Row, ...]
    guidance: float
    text: Conditioning
    latents: Tensor  # (1, C, h, w)
    clean: Tensor  # (1, C, h, w), the last prediction
    index: int = 0
    nfe: int = 0
    timings_ms: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def done(self) -> bool:
        return self.index == len(self.rows)


class Engine:
    """One model on one device. Not thread-safe: one thread owns it."""

    def __init__(self, loaded: Loaded, backend: str = "auto") -> None:
        self.spec, self.model = loaded.spec, loaded.model
        self.denoise = CountedDenoiser(create(backend, loaded.model.denoiser))
        self.info = _info(loaded)
        self.infos: dict[str, ModelInfo] = {self.info.id: self.info}
        self._empty: dict[int, Conditioning] = {}

    def check(self, request: Request) -> Shape:
        """The shape of a request's forwards. Safe from any thread; runs nothing.

        Raises UnknownModel, or InvalidRequest for anything that cannot be made as asked.
        """
        info = self._info_of(request)
        check_request(request, info)
        self.model.check_prompt(request.prompt)
        guidance = info.guidance if request.guidance is None else request.guidance
        length = padded_length(len(self.model.tokens(request.prompt)))
        return Shape(request.width, request.height, length, guidance != 1.0)

    def _info_of(self, request: Request) -> ModelInfo:
        if request.model and request.model not in self.infos:
            raise UnknownModel(f"model {request.model!r} is not served here; served are {', '.join(self.infos)}")
        return self.infos[request.model] if request.model else self.info

    def cached(self, request: Request) -> bool:  # noqa: ARG002 - nothing is kept yet
        """Whether a request's text is at hand, so that its start is nearly free. Safe from any thread."""
        return False

    def faulty(self, samples: Sequence[Sample]) -> list[int]:
        """Indices of the samples whose latents are no longer numbers."""
        return [index for index, sample in enumerate(samples) if not bool(sample.latents.isfinite().all())]

    def preview(self, latents: Tensor) -> Image.Image:
        """A cheap look at clean latents (1, C, h, w), at the picture's size. Safe from any thread."""
        grey = (latents[0].mean(0).float().cpu() * 32 + 128).clamp(0, 255).to(torch.uint8)
        small = Image.fromarray(grey.numpy()).convert("RGB")
        return small.resize((small.width * self.model.factor, small.height * self.model.factor))

    @staticmethod
    def out_of_memory(error: BaseException) -> bool:
        """Whether an error says that the device's memory is full, in any of torch's ways."""
        full = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and full)

    def empty_cache(self) -> None:
        """Gives back what the allocator holds but does not use."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def start(self, requests: Sequence[Request]) -> list[Sample]:
        """Encodes the prompts and draws the noise. Equal prompts in one batch are encoded once."""
        started = time.perf_counter()
        encoded = {prompt: self.model.condition(prompt) for prompt in dict.fromkeys(r.prompt for r in requests)}
        samples = [self._sample(request, encoded[request.prompt]) for request in requests]
        _share(samples, "text", started)
        return samples

    def _sample(self, request: Request, text: Conditioning) -> Sample:
        noise = self.model.noise(request.seed, request.width, request.height)
        guidance = self.spec.guidance if request.guidance is None else request.guidance
        return Sample(request, self.spec.rows(request.steps), guidance, text, noise, torch.zeros_like(noise))

    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """One network evaluation (two with guidance) for samples of one latent and text shape."""
        started = time.perf_counter()
        rows = [sample.rows[sample.index] for sample in samples]
        latents = torch.cat([sample.latents for sample in samples])  # (B, C, h, w)
        before = self.denoise.evaluations
        velocity = self._velocity(samples, latents, rows).float()
        spent = (self.denoise.evaluations - before) // len(samples)
        sigma, a, b, c = (_column(rows, name, latents) for name in ("sigma", "a", "b", "c"))
        clean = latents - sigma * velocity
        following = a * latents + b * clean
        if any(row.c for row in rows):
            following = following + c * torch.cat([sample.clean for sample in samples])
        for i, sample in enumerate(samples):
            sample.latents, sample.clean = following[i : i + 1], clean[i : i + 1]
            sample.index += 1
            sample.nfe += spent
        _share(samples, "denoise", started)

    def _velocity(self, samples: Sequence[Sample], latents: Tensor, rows: Sequence[Row]) -> Tensor:
        """The network's velocity; with guidance, away + w * (towards - away) in one doubled batch."""
        text = torch.cat([sample.text.text for sample in samples])
        modulation = torch.cat([self.model.modulation(row.sigma) for row in rows])
        latents = latents.to(self.model.dtype)
        if samples[0].guidance == 1.0:
            return self.denoise(latents, modulation, text)
        away = self._unconditional(text.shape[1]).expand_as(text)
        both = self.denoise(latents.repeat(2, 1, 1, 1), modulation.repeat(2, 1, 1), torch.cat((text, away)))
        towards, back = both.float().chunk(2)
        weight = latents.new_tensor([sample.guidance for sample in samples], dtype=torch.float32)
        return back + weight.view(-1, 1, 1, 1) * (towards - back)

    def _unconditional(self, length: int) -> Tensor:
        """The encoded empty prompt (1, length, D), padded as the conditional one is."""
        if length not in self._empty:
            self._empty[length] = self.model.condition("", length)
        return self._empty[length].text

    @torch.inference_mode()
    def finish(self, samples: Sequence[Sample]) -> list[GeneratedImage]:
        """Decodes clean latents of one size and wraps the pictures with their recipes."""
        started = time.perf_counter()
        if faulty := self.faulty(samples):
            raise PictureFailed(f"pictures {faulty} of a batch of {len(samples)} have latents that are no numbers")
        pictures = self.model.decode([sample.latents for sample in samples]).numpy()
        _share(samples, "decode", started)
        return [self._wrap(s, Image.fromarray(p)) for s, p in zip(samples, pictures, strict=True)]

    def _wrap(self, sample: Sample, picture: Image.Image) -> GeneratedImage:
        request, timings = sample.request, sample.timings_ms
        return GeneratedImage(
            image=picture,
            prompt=request.prompt,
            seed=request.seed,
            width=request.width,
            height=request.height,
            nfe=sample.nfe,
            sigmas=tuple(row.sigma for row in sample.rows),
            guidance=sample.guidance,
            model=self.info.id,
            checkpoint_hash=self.info.checkpoint_hash,
            timings_ms={**timings, "total": sum(timings.values())},
        )

    def generate(self, requests: Sequence[Request], callback: StepCallback | None = None) -> list[GeneratedImage]:
        """Start, step until done, finish: for requests of one size, step count and guidance setting."""
        samples = self.start(requests)
        groups = by_shape(samples)
        while not samples[0].done:
            for group in groups:
                self.step(group)
            if callback is not None:
                callback(_event(samples))
        return self.finish(samples)


def by_shape(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that can share a forward: same padded text length, guidance on or off."""
    groups: dict[tuple[int, bool], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.text.text.shape[1], sample.guidance == 1.0), []).append(sample)
    return list(groups.values())


def _event(samples: Sequence[Sample]) -> StepEvent:
    first = samples[0]
    clean = torch.cat([sample.clean for sample in samples])
    return StepEvent(first.index - 1, len(first.rows), first.rows[first.index - 1].sigma, clean)


def _column(rows: Sequence[Row], name: str, like: Tensor) -> Tensor:
    """One coefficient of every row as (B, 1, 1, 1); float64 rows rounded once to float32."""
    values = torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
    return values.to(like.device, torch.float32).view(-1, 1, 1, 1)


def _share(samples: Sequence[Sample], stage: str, started: float) -> None:
    """Adds the wall-clock milliseconds since `started` to a stage of every sample in the batch."""
    if samples and samples[0].latents.device.type == "cuda":
        torch.cuda.synchronize(samples[0].latents.device)
    elapsed = (time.perf_counter() - started) * 1000
    for sample in samples:
        sample.timings_ms[stage] = sample.timings_ms.get(stage, 0.0) + elapsed


def _info(loaded: Loaded) -> ModelInfo:
    spec = loaded.spec
    return ModelInfo(
        id=spec.id,
        family=spec.family,
        checkpoint_hash=loaded.checkpoint_hash,
        nfe=evaluations(spec.sigmas, spec.guidance),
        sigmas=spec.sigmas,
        guidance=spec.guidance,
        width=spec.width,
        height=spec.height,
        size_multiple=spec.size_multiple,
        min_side=spec.min_side,
        max_side=spec.max_side,
        max_prompt_tokens=spec.max_prompt_tokens,
        description=spec.description,
    )
