"""The device side: start a batch, step it, finish it. Owns the model; knows nothing of queues or HTTP.

One base with one or more versions. Every picture in a batch has its own place in its own sampler table and its own
version and strength of its adapter, so a batch may hold pictures at different steps of different tables and versions;
what they must share is their `Shape`. Rows are sorted by variant, and the route through the denoiser is an argument of
the call (`models.routed`).

Pixels follow from a request and its checkpoint alone. `strict` keeps that bit by bit: text is encoded and pictures are
decoded one at a time and, on a GPU, whose matrix products change with the number of rows, evaluations run one picture
at a time with deterministic convolutions. It is the default on a CPU, where evaluations of a batch are bitwise those of
its pictures alone, except in networks with convolutions, which run one picture at a time there, too.
`benchmarks/invariance.py` measures what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Unpack
from weakref import WeakSet

import torch
from PIL import Image
from torch import Tensor

from tdm_serve import preview
from tdm_serve.backends import check_choice, create, load_exported
from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape, StepCallback, StepEvent
from tdm_serve.errors import ConfigError, PictureFailed, PromptTooLong, UnknownModel
from tdm_serve.models.catalog import Reference, evaluations, resolve
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.load import Loaded, MemoryOptions, Served, check_unused, join, load
from tdm_serve.models.routed import Variant, route_of
from tdm_serve.models.versions import Versions
from tdm_serve.nfe import CountedDenoiser
from tdm_serve.prompt_cache import DEFAULT_MB, PromptCache
from tdm_serve.sample import Sample
from tdm_serve.sampling import Row
from tdm_serve.texts import Text, Texts
from tdm_serve.validation import check_request, guidance_of

__all__ = ["Engine", "Sample", "by_shape"]


class Engine:
    """Versions of one base on one device. Not thread-safe, except where a method says so: one thread owns it."""

    def __init__(
        self,
        loaded: Loaded,
        backend: str = "auto",
        *,
        strict: bool | None = None,
        memory_mb: float | None = None,
        cache_mb: float = DEFAULT_MB,
    ) -> None:
        """`strict` of None is on for a CPU and off for a GPU. `memory_mb` bounds what versions hold beside the base,
        `cache_mb` what encoded prompts do. Raises ConfigError, CheckpointError or BackendUnavailable.
        """
        self.model = loaded.model
        self.infos: Mapping[str, ModelInfo] = {one.spec.id: _info(one, self.model.versions) for one in loaded.served}
        self.info = next(iter(self.infos.values()))
        on_cpu = self.model.device.type == "cpu"
        self.strict = on_cpu if strict is None else strict
        self.denoise = CountedDenoiser(create(backend, self.model.denoiser))
        self.versions = self.model.versions
        self.versions.limit(memory_mb)
        self.cache = PromptCache(cache_mb)
        separate = any(info.adapter == "separate" for info in self.infos.values())  # its scales are variants, too
        several = separate or loaded.growing or len(loaded.served) > 1
        self._texts = Texts(self.model, self.cache, loaded.encoder_hash, several=several, together=not self.strict)
        self._specs = {one.spec.id: one.spec for one in loaded.served}
        self._alone = self.strict and not (on_cpu and self.model.exact_on_cpu)
        self._mixes = (
            not on_cpu and not self.strict
        )  # texts of several lengths; on a CPU it costs, benchmarks/mixing.py
        self._live: WeakSet[Sample] = WeakSet()

    @classmethod
    def load(
        cls,
        models: Reference | Sequence[Reference],
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        adapters: str = "fused",
        strict: bool | None = None,
        memory_mb: float | None = None,
        cache_mb: float = DEFAULT_MB,
        growing: bool = False,
        engine: Path | None = None,
        **memory: Unpack[MemoryOptions],
    ) -> Engine:
        """Serves one model, or several versions of one base, such as `["default", "default-teacher"]`; the first is
        what a request gets that names none. `adapters` is "fused" (fast) or "separate" (small, and a request may have
        its adapter weaker or stronger); to a `growing` engine others can be added. `engine` is the folder of an
        exported one, made from the model that is named. `memory` is `tdm_serve.models.load.MemoryOptions`.
        """
        check_choice(backend, engine)
        if engine is not None:
            check_unused(memory, "an exported engine has its own placement and types")
            if adapters != "fused":
                raise ConfigError(f"adapters is {adapters!r}, but an exported engine has its adapter in its weights")
            loaded, backend = load_exported(models, engine, backend, device, dtype)
        else:
            loaded = load(models, device, dtype, adapters, growing=growing, **memory)
        return cls(loaded, backend, strict=strict, memory_mb=memory_mb, cache_mb=cache_mb)

    def examine(self, reference: Reference) -> Served:
        """A version that is to be added: its files checked and hashed, which takes a while. Safe from any thread."""
        return join(resolve(reference), self.model.spec)

    def add(self, served: Served) -> ModelInfo:
        """One more version of this base, from now on; pictures under way notice nothing.

        Raises ConfigError where this engine is not `growing`, where the id is taken or the memory budget too small,
        and CheckpointError where the adapter does not fit.
        """
        version = served.spec.id
        if version in self.infos:
            raise ConfigError(f"{version} is served already; a version that joins needs an id of its own")
        busy = {sample.info.id for sample in self._live if not sample.done}
        self.versions.add(version, served.spec.adapters, busy)
        self._specs[version] = served.spec
        info = _info(served, self.versions)
        self.infos = {**self.infos, version: info}  # a new one: other threads may be reading the old one
        return info

    def check(self, request: Request) -> Shape:
        """The shape of a request's forwards. Safe from any thread; runs nothing.

        Raises UnknownModel, or InvalidRequest for anything that cannot be made as asked.
        """
        info = self._info_of(request)
        check_request(request, info)
        self.model.check_size(request.width, request.height)
        guided = guidance_of(request, info) != 1.0
        cut = request.truncate_prompt
        length = self.model.check_prompt(request.prompt, truncate=cut)
        if guided:  # both predictions run in one forward
            length = max(length, self.model.check_prompt(request.negative_prompt, "negative_prompt", cut))
        if self._mixes:
            length = self.model.shared_length(length, request.width, request.height)
        return Shape(request.width, request.height, length, guided)

    def look(self, request: Request) -> tuple[Shape, bool]:
        """What `check` says and raises, and whether the request's text is at hand, so that its start is nearly free."""
        shape = self.check(request)
        return shape, self._texts.kept(self._wanted(request, shape))

    def _info_of(self, request: Request) -> ModelInfo:
        if request.model and request.model not in self.infos:
            raise UnknownModel(f"model {request.model!r} is not served here; served are {', '.join(self.infos)}")
        return self.infos[request.model] if request.model else self.info

    def _variant(self, request: Request) -> Variant:
        scale = 1.0 if request.adapter_scale is None else request.adapter_scale
        return Variant(self._info_of(request).id, scale)

    def _wanted(self, request: Request, shape: Shape) -> list[Text]:
        """The texts of a request: its prompt and, with guidance, what to keep away from."""
        prompts = [request.prompt, request.negative_prompt] if shape.guided else [request.prompt]
        variant = self._variant(request)
        cut = request.truncate_prompt
        return [
            Text(tuple(self.model.tokens(prompt, cut)), self.model.check_prompt(prompt, truncate=cut), variant)
            for prompt in prompts
        ]

    def _truncated(self, request: Request) -> bool:
        """Whether anything of a valid request's prompts is cut off."""
        if not request.truncate_prompt:
            return False
        try:
            self.check(replace(request, truncate_prompt=False))
        except PromptTooLong:
            return True
        return False

    @torch.inference_mode()
    def start(self, requests: Sequence[Request]) -> list[Sample]:
        """Encodes the prompts and draws the noise. Equal prompts in one batch are encoded once.

        Raises what `check` does, and CheckpointError for a version that cannot be loaded any more.
        """
        started = time.perf_counter()
        shapes = [self.check(request) for request in requests]
        self._load_versions({self._info_of(request).id for request in requests})
        wanted = [self._wanted(request, shape) for request, shape in zip(requests, shapes, strict=True)]
        texts = self._texts.get(text for each in wanted for text in each)
        samples = [
            self._sample(request, shape, [texts[text] for text in each], self.model.count(request.prompt))
            for request, shape, each in zip(requests, shapes, wanted, strict=True)
        ]
        self._live.update(samples)
        self._share(samples, "text", started)
        return samples

    def _load_versions(self, wanted: Collection[str]) -> None:
        busy = {sample.info.id for sample in self._live if not sample.done}
        for version in sorted(wanted):
            self.versions.use(version, busy | set(wanted))

    def _sample(self, request: Request, shape: Shape, texts: Sequence[Tensor], tokens: int) -> Sample:
        noise = self.model.noise(request.seed, request.width, request.height)
        info = self._info_of(request)
        return Sample(
            request,
            info,
            self._variant(request),
            shape,
            rows=self._specs[info.id].rows(request.steps, request.width, request.height),
            guidance=guidance_of(request, info),
            text=texts[0],
            away=texts[1] if shape.guided else None,
            latents=noise,
            clean=torch.zeros_like(noise),
            tokens=tokens,
            truncated=self._truncated(request),
        )

    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """One network evaluation (two with guidance) of unfinished samples that share a shape.

        All of them take the step, or, when it raises, none has changed.
        """
        started = time.perf_counter()
        batch = sorted(samples, key=lambda sample: sample.variant)
        assert len({sample.shape for sample in batch}) == 1, "samples of one step share their shape"
        rows = [sample.row for sample in batch]
        before = self.denoise.evaluations
        parts = [[sample] for sample in batch] if self._alone else [batch]
        output = torch.cat([self._output(part) for part in parts])
        spent = (self.denoise.evaluations - before) // len(batch)
        shares = [self._specs[sample.info.id].clean_shares(row.sigma) for sample, row in zip(batch, rows, strict=True)]
        following, clean = _advanced(batch, rows, shares, output)
        self._synchronise()  # what goes wrong on the device shows here at the latest
        for sample, latents, prediction in zip(batch, following.split(1), clean.split(1), strict=True):
            sample.latents, sample.clean = latents, prediction
            sample.index += 1
            sample.nfe += spent
        self._share(batch, "denoise", started)

    def _output(self, batch: Sequence[Sample]) -> Tensor:
        """The network's output in float32; with guidance, away + w * (towards - away) in one doubled batch."""
        latents = torch.cat([sample.latents for sample in batch]).to(self.model.dtype)  # (B, C, h, w)
        texts = [sample.text for sample in batch]
        modulation = torch.cat([self.model.timed(sample.row, sample.text, sample.variant) for sample in batch])
        variants = [sample.variant for sample in batch]
        if not batch[0].shape.guided:
            text, lengths = self.model.joined(texts)
            return self.denoise(latents, modulation, text, route_of(variants), lengths).float()
        texts += [sample.away for sample in batch if sample.away is not None]
        text, lengths = self.model.joined(texts)
        times = [self.model.timed(one.row, one.away, one.variant) for one in batch if one.away is not None]
        doubled = latents.repeat(2, 1, 1, 1), torch.cat((modulation, *times)), text
        towards, back = self.denoise(*doubled, route_of(variants * 2), lengths).float().chunk(2)
        weight = latents.new_tensor([sample.guidance for sample in batch], dtype=torch.float32)
        return back + weight.view(-1, 1, 1, 1) * (towards - back)

    def faulty(self, samples: Sequence[Sample]) -> list[int]:
        """Indices of the samples whose latents are no longer numbers."""
        return [index for index, sample in enumerate(samples) if not bool(sample.latents.isfinite().all())]

    @torch.inference_mode()
    def finish(self, samples: Sequence[Sample]) -> list[GeneratedImage]:
        """Decodes clean latents and wraps the pictures with their recipes. Raises PictureFailed for faulty ones."""
        started = time.perf_counter()
        if faulty := self.faulty(samples):
            raise PictureFailed(f"pictures {faulty} of a batch of {len(samples)} have latents that are no numbers")
        pictures = [picture for group in _by_size(samples) for picture in self._decode(group)]
        self._share(samples, "decode", started)
        self.versions.trim({sample.info.id for sample in self._live if not sample.done})
        return [sample.wrap(picture) for sample, picture in zip(samples, pictures, strict=True)]

    def _decode(self, samples: Sequence[Sample]) -> list[Image.Image]:
        """Pictures of samples of one size."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=self.strict):
            pixels = self.model.decode([sample.latents for sample in samples], together=not self.strict)
        return [Image.fromarray(picture) for picture in pixels.numpy()]

    def preview(self, latents: Tensor) -> Image.Image:
        """A cheap look at clean latents (1, C, h, w), at the picture's size. Safe from any thread."""
        return preview.picture(latents, self.model.preview, self.model.factor)

    @staticmethod
    def out_of_memory(error: BaseException) -> bool:
        """Whether an error says that the device's memory is full, in any of torch's ways."""
        full = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and full)

    def empty_cache(self) -> None:
        """Gives back what the allocator holds but does not use."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(self, requests: Sequence[Request], callback: StepCallback | None = None) -> list[GeneratedImage]:
        """Start, step until done, finish. A callback needs requests of one size and step count."""
        samples = self.start(requests)
        while going := [sample for sample in samples if not sample.done]:
            for group in by_shape(going):
                self.step(group)
            if callback is not None:
                callback(_event(samples))
        return self.finish(samples)

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _share(self, samples: Sequence[Sample], stage: str, started: float) -> None:
        """Adds the wall-clock milliseconds since `started` to a stage of every sample in the batch."""
        self._synchronise()
        elapsed = (time.perf_counter() - started) * 1000
        for sample in samples:
            sample.timings_ms[stage] = sample.timings_ms.get(stage, 0.0) + elapsed


def by_shape(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples that can share a forward."""
    groups: dict[Shape, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.shape, []).append(sample)
    return list(groups.values())


def _by_size(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Runs of neighbours of one size."""
    return [list(run) for _, run in groupby(samples, lambda sample: (sample.shape.width, sample.shape.height))]


def _advanced(
    batch: Sequence[Sample], rows: Sequence[Row], shares: Sequence[tuple[float, float]], output: Tensor
) -> tuple[Tensor, Tensor]:
    """(the next latents, the predicted clean ones), (B, C, h, w) each; every sample with its own coefficients."""
    latents = torch.cat([sample.latents for sample in batch])
    a, b, c = (_column([getattr(row, name) for row in rows], latents) for name in ("a", "b", "c"))
    p, q = (_column(column, latents) for column in zip(*shares, strict=True))
    clean = p * latents + q * output
    following = a * latents + b * clean
    if any(row.c for row in rows):
        following = following + c * torch.cat([sample.clean for sample in batch])
    return following, clean


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One coefficient of every row as (B, 1, 1, 1); float64 rows rounded once to float32."""
    return torch.tensor(values, dtype=torch.float64).to(like.device, torch.float32).view(-1, 1, 1, 1)


def _event(samples: Sequence[Sample]) -> StepEvent:
    first = samples[0]
    clean = torch.cat([sample.clean for sample in samples])
    return StepEvent(first.index - 1, len(first.rows), first.rows[first.index - 1].sigma, clean)


def _info(served: Served, versions: Versions) -> ModelInfo:
    spec = served.spec
    kept = "separate" if versions.separate(spec.id) else "fused"
    return ModelInfo(
        id=spec.id,
        family=spec.family,
        checkpoint_hash=served.checkpoint_hash,
        nfe=evaluations(spec.sigmas, spec.guidance),
        sigmas=spec.sigmas,
        guidance=spec.guidance,
        width=spec.width,
        height=spec.height,
        size_multiple=spec.size_multiple,
        min_side=spec.min_side,
        max_side=spec.max_side,
        max_prompt_tokens=spec.max_prompt_tokens,
        sizes=spec.sizes,
        description=spec.description,
        free_steps=spec.free_steps,
        guidance_off=FAMILIES[spec.family].guidance_off,
        adapter=kept if spec.adapters else "none",
    )
