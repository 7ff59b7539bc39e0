"""The engine behind asyncio: one thread owns the device, callers hold tickets, pictures share every evaluation.

A request is checked and admitted in the caller's event loop: it gets a promise, or is refused at once. From there the
device thread makes it, evaluation by evaluation, with whatever company the scheduler finds best, and posts what happens
to the event loop that asked.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tdm_serve.core import GeneratedImage, ModelInfo, Request, Shape, Terms
from tdm_serve.desk import Desk
from tdm_serve.device import Device
from tdm_serve.device_thread import DeviceThread
from tdm_serve.errors import ConfigError, EngineClosed, InvalidRequest, TdmServeError, UnknownModel
from tdm_serve.identity import compiles, identity_of, memory_of, versions_of
from tdm_serve.models.catalog import Reference
from tdm_serve.orders import Asked
from tdm_serve.pipeline import Pipeline
from tdm_serve.preview_thread import PreviewThread
from tdm_serve.profile import Profile
from tdm_serve.scheduler import Policy
from tdm_serve.stats import EngineStats, WarmShape
from tdm_serve.ticket import Mailbox, Ticket, post
from tdm_serve.warmup import WarmUp, load_profile, profile_path, save_profile, shape_of
from tdm_serve.watchdog import HANG_S, Watch, Watchdog

logger = logging.getLogger(__name__)

PLAIN = Terms()
STANDARD = Policy()
HUNG_GRACE_S = 5.0


class AsyncEngine:
    """Create it anywhere; `start`, `submit`, `generate` and `close` run in event loops, also in several."""

    def __init__(
        self,
        engine: Device | Pipeline,
        *,
        policy: Policy = STANDARD,
        max_batch: int | None = None,
        profile: Path | None = None,
        warm: Sequence[Shape | tuple[int, int]] = (),
        hang_s: float | None = HANG_S,
    ) -> None:
        """`warm` lists what is measured before `ready`; empty is the default model's size.

        `profile` is the file in which measured costs are kept, or a folder with one for each device; None is the folder
        TDM_SERVE_STATE_DIR or the user's cache folder. A run that takes longer than `hang_s`, and far longer than
        predicted, is taken for hung; None watches nothing. Raises ConfigError, and InvalidRequest for a size in `warm`.
        """
        if max_batch is not None:
            if max_batch < 1:
                raise ConfigError(f"max_batch is {max_batch}; it must be at least 1")
            policy = dataclasses.replace(policy, max_batch=min(policy.max_batch, max_batch))
        device: Device = engine.engine if isinstance(engine, Pipeline) else engine
        self.info: ModelInfo = next(iter(device.infos.values()))
        self.shapes = tuple(shape_of(device, size) for size in warm or [(self.info.width, self.info.height)])
        self._device = device
        self._policy = policy
        self._identity = identity_of(device)
        self._path = profile_path(profile, self._identity)
        self._previews = PreviewThread(device.preview, lambda mailbox: self.cancel(mailbox.number))
        watch = Watch(hang_s, compiles=compiles(device))
        self._desk = Desk(Profile(self._identity, len(self.info.sigmas)), policy, self._previews, watch)
        self._watchdog = Watchdog(hang_s, self._desk.look)
        self._thread = DeviceThread(device, self._desk, self._warm_up, self._warmed)
        self._warm = False
        self._warm_lookups = 0, 0  # hits and misses of the prompt cache that were the warm-up's
        self._ending = threading.Lock()
        self._starter: Mailbox | None = None

    @property
    def infos(self) -> Mapping[str, ModelInfo]:
        """The versions that can be asked for, the default first."""
        return self._device.infos

    @property
    def ready(self) -> bool:
        """Whether requests are served at once: the listed shapes are warm, and it is not closing, dead or hung."""
        return self._warm and not self._desk.closing and self._desk.dead is None and self._desk.watch.hung is None

    @property
    def hung(self) -> str | None:
        """What the device hangs in; it may come back."""
        return self._desk.watch.hung

    @property
    def degraded(self) -> str | None:
        """What happened, where the device thread had to be restarted or is dead."""
        return self._desk.degraded

    async def start(self) -> None:
        """Starts the device thread and warms up. Raises what the warm-up raised, EngineClosed when closed meanwhile."""
        if self._starter is not None:
            raise RuntimeError("an engine starts only once; create another one")
        self._starter = Mailbox(asyncio.get_running_loop())
        self._thread.start()
        self._watchdog.start()
        error = await self._starter.arrival()
        if isinstance(error, Exception):
            raise error
        if self._desk.closing:
            raise EngineClosed("the engine was closed while it warmed up")

    def check(self, request: Request) -> None:
        """Raises InvalidRequest or UnknownModel for what `submit` would not take; queues nothing. Any thread."""
        self._asked(request)

    def submit(self, requests: Sequence[Request], terms: Terms = PLAIN, *, previews: bool = False) -> Ticket:
        """Takes all pictures, with a promise, or none. Call it in an event loop; it returns at once.

        Raises InvalidRequest or UnknownModel, Overloaded or DeadlineUnreachable, EngineClosed or EngineFailed.
        """
        mailbox = Mailbox(asyncio.get_running_loop())
        order = self._desk.submit(self._checked(requests), terms, mailbox, previews)
        return Ticket(uuid.uuid4().hex, order.number, mailbox, self)

    def _checked(self, requests: Sequence[Request]) -> list[Asked]:
        try:
            if not requests:
                raise InvalidRequest("the list of requests is empty; ask for at least one picture", param="n")
            return [self._asked(request) for request in requests]
        except TdmServeError:
            self._desk.refused("invalid")
            raise

    def _asked(self, request: Request) -> Asked:
        model = request.model or self.info.id
        if model not in self.infos:
            served = ", ".join(repr(name) for name in self.infos)
            raise UnknownModel(f"model {model!r} is not served; allowed: {served}")
        shape, cached = self._device.look(request)
        steps = len(self.infos[model].sigmas) if request.steps is None else request.steps
        return Asked(request, shape, model, steps, cached)

    async def generate(self, requests: Sequence[Request], terms: Terms = PLAIN) -> list[GeneratedImage]:
        """Submits and waits. A cancelled caller cancels its pictures."""
        ticket = self.submit(requests, terms)
        try:
            return await ticket.result()
        finally:
            ticket.cancel()  # nothing happens to one that is done

    async def add_version(self, reference: Reference) -> ModelInfo:
        """One more version of the base, while others are served, or before the start: a checkpoint folder, or a spec.

        Raises CheckpointError or ConfigError for what does not fit, EngineClosed or EngineFailed.
        """
        served = await asyncio.to_thread(self._device.examine, reference)
        if self._starter is None:
            return self._device.add(served)
        added: ModelInfo = await asyncio.wrap_future(self._desk.errand(lambda: self._device.add(served)))
        return added

    def cancel(self, number: int) -> bool:
        """What `Ticket.cancel` does."""
        return self._desk.cancel(number)

    def eta_ms(self, number: int) -> float:
        """What `Ticket.eta_ms` shows."""
        return self._desk.eta_ms(number)

    def position(self, number: int) -> int:
        """What `Ticket.position` shows."""
        return self._desk.position(number)

    def stats(self) -> EngineStats:
        """What was done so far and is under way. Cheap; from any thread."""
        cache = self._device.cache
        hits, misses, held = cache.hits, cache.misses, cache.bytes
        memory, versions = memory_of(self._device), versions_of(self._device)
        with self._desk.lock:
            waiting, running, backlog_ms = self._desk.load()
            return EngineStats(
                **self._desk.counters.snapshot(),
                ready=self.ready,
                degraded=self.degraded,
                waiting=waiting,
                running=running,
                backlog_ms=backlog_ms,
                cache_hits=hits - self._warm_lookups[0],
                cache_misses=misses - self._warm_lookups[1],
                cache_bytes=held,
                memory_bytes=memory,
                **versions,
            )

    def capabilities(self) -> list[WarmShape]:
        """The warm shapes and what is predicted for them; empty until `ready`."""
        with self._desk.lock:
            return [self._capability(shape) for shape in self.shapes] if self._warm else []

    def _capability(self, shape: Shape) -> WarmShape:
        profile = self._desk.profile
        alone = {
            name: profile.alone_ms(shape, len(info.sigmas))
            for name, info in self.infos.items()
            if (info.guidance != 1.0) == shape.guided
        }
        best = min(profile.best_batch(shape), self._policy.max_batch)
        return WarmShape(shape.width, shape.height, shape.text, shape.guided, best, alone)

    async def close(self) -> None:
        """Refuses the new with EngineClosed, finishes what was accepted, ends the threads. Any number of times.

        A device that hangs has HUNG_GRACE_S to come back; what waits for it ends with EngineClosed then.
        """
        self._desk.close()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        began = time.monotonic()
        if not self._thread.join(lambda: self.hung is not None and time.monotonic() - began > HUNG_GRACE_S):
            logger.error("the engine closes without its device: %s", self.hung)
        self._desk.drop_rest()
        self._watchdog.close()
        self._previews.close()
        with self._ending:
            if self._warm:
                self._warm = False
                save_profile(self._desk.profile, self._path)

    def _warm_up(self) -> None:
        """In the device thread, before it serves."""
        stored = load_profile(self._path, self._identity, len(self.info.sigmas))
        warm_up = WarmUp(
            self._device,
            self.shapes,
            self._policy.max_batch,
            stopping=lambda: self._desk.closing,
            every_batch=compiles(self._device),
        )
        profile = warm_up.run(stored)
        self._warm_lookups = self._device.cache.hits, self._device.cache.misses
        if not self._desk.closing:
            save_profile(profile, self._path)
        self._desk.profiled(profile)

    def _warmed(self, error: Exception | None) -> None:
        """In the device thread, after the warm-up."""
        self._warm = error is None and not self._desk.closing
        if self._starter is not None:
            post([(self._starter, [] if error is None else error)])
