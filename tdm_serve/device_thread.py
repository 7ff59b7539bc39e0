"""The one thread that owns the device: take a run, do it, hand in what came of it; until the desk is closed and empty.

Failures of pictures are isolated (`isolate`) and never end the thread. What ends it is anything else: a bug, or a
device on which not even a plain picture can be made any more. It then gets one successor; when that dies too, the
engine is dead.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tdm_serve.core import GeneratedImage, Progress, Request
from tdm_serve.desk import Desk
from tdm_serve.device import Device, Underway
from tdm_serve.errors import EngineFailed, OutOfDeviceMemory
from tdm_serve.isolate import Parted, described, forget_frames, isolated
from tdm_serve.orders import Done, Errand, Item
from tdm_serve.scheduler import Run, Stage

logger = logging.getLogger(__name__)

DEAD = "the device failed twice; the server must be restarted"
TICK_S = 0.1
PATIENCE_S = 10.0  # for the run under way, when a program ends without closing
UNPREPARED = "the device could not be prepared; the server's log says why"


class DeviceThread:
    """`prepare` runs first, in the first thread; `prepared` hears how that went: None, or the error that it raised."""

    def __init__(
        self, device: Device, desk: Desk, prepare: Callable[[], object], prepared: Callable[[Exception | None], object]
    ) -> None:
        self._device = device
        self._desk = desk
        self._prepare, self._prepared = prepare, prepared
        info = next(iter(device.infos.values()))
        self._plain = Request("a red circle", 0, info.width, info.height)
        self._thread = self._new(self._first)

    def _new(self, target: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=target, name="tdm-serve device", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Once. Raises RuntimeError at the second time."""
        self._thread.start()
        atexit.register(self._abandon)

    def join(self, given_up: Callable[[], bool]) -> bool:
        """Waits for the thread, and for its successor if it dies meanwhile. At once where it was never started.

        False where it was `given_up` instead.
        """
        while (thread := self._thread).is_alive():
            if given_up():
                return False
            thread.join(TICK_S)
        atexit.unregister(self._abandon)
        return True

    def _abandon(self) -> None:
        """At the end of a program that did not close its engine: Python would kill the thread in the middle of C++."""
        self._desk.close()
        self._desk.drop_rest()
        self._thread.join(PATIENCE_S)

    def _first(self) -> None:
        try:
            self._prepare()
        except BaseException as error:  # noqa: BLE001 - as in `_guarded`
            logger.critical("the device could not be prepared: %s", described(error))
            forget_frames(error)
            self._desk.fail(UNPREPARED)
            self._prepared(error if isinstance(error, Exception) else EngineFailed(UNPREPARED))
            return
        self._prepared(None)
        self._guarded(self._serve, self._succeed)

    def _second(self) -> None:
        def serve() -> None:
            self._make_plain()
            self._serve()

        self._guarded(serve, self._give_up)

    def _guarded(self, serve: Callable[[], None], then: Callable[[str], None]) -> None:
        try:
            serve()
        except BaseException as error:  # noqa: BLE001 - whatever it is, this thread is over and its callers must know
            logger.critical("the device thread died: %s", described(error))
            then(type(forget_frames(error)).__name__)

    def _succeed(self, reason: str) -> None:
        try:
            self._desk.crashed(f"the device thread died of {reason} and was restarted")
        except Exception as error:
            logger.exception("the queue could not be restored")
            self._give_up(type(error).__name__)
            return
        self._thread = self._new(self._second)
        self._thread.start()

    def _give_up(self, reason: str) -> None:
        self._desk.degraded = f"the device thread died twice, the second time of {reason}"
        self._desk.fail(DEAD)

    def _serve(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One run, or one errand. A function of its own, so that no sample outlives it in a variable."""
        task = self._desk.take()
        if task is None:
            return False
        if isinstance(task, Errand):
            task.run()
            return True
        run, items = task
        started = time.perf_counter()
        done = self._do(run, items)
        done.ms = (time.perf_counter() - started) * 1000
        self._desk.done(run, items, done)
        return True

    def _do(self, run: Run, items: Sequence[Item]) -> Done:
        if run.stage is Stage.START:
            return self._start(items)
        if run.stage is Stage.STEP:
            return self._step(items)
        return self._finish(items)

    def _start(self, items: Sequence[Item]) -> Done:
        before = self._device.cache.misses
        parted = self._isolated(lambda some: self._device.start([item.request for item in some]), items)
        for item, sample in parted.made:
            item.sample = sample
        return Done(failed=parted.failed, fresh=self._device.cache.misses - before)

    def _step(self, items: Sequence[Item]) -> Done:
        before = {item: _sample(item).nfe for item in items}
        parted = self._isolated(self._step_some, items)
        done = Done(parted.failed, fits=parted.fits)
        for item, sample in parted.made:
            done.evaluations.append((item.work.model, sample.nfe - before[item]))
            done.progress.append((item, Progress(item.index, sample.index, len(sample.rows)), sample.clean))
        return done

    def _step_some(self, items: Sequence[Item]) -> list[Underway]:
        samples = [_sample(item) for item in items]
        self._device.step(samples)
        return samples

    def _finish(self, items: Sequence[Item]) -> Done:
        parted = self._isolated(self._finish_some, items)
        return Done(parted.failed, images=parted.made, fits=parted.fits)

    def _finish_some(self, items: Sequence[Item]) -> list[GeneratedImage]:
        return self._device.finish([_sample(item) for item in items])

    def _isolated(self, action: Callable[[Sequence[Item]], Sequence[Any]], items: Sequence[Item]) -> Parted[Item, Any]:
        """Where no picture of a run goes through, it may be the device: a plain picture tells."""
        parted = isolated(self._device, action, items)
        if not parted.made and not any(isinstance(error, OutOfDeviceMemory) for _, error in parted.failed):
            try:
                self._make_plain()
            except Exception as error:
                if not self._device.out_of_memory(error):
                    raise
        return parted

    def _make_plain(self) -> None:
        samples = self._device.start([self._plain])
        self._device.step(samples)
        self._device.finish(samples)


def _sample(item: Item) -> Underway:
    assert item.sample is not None, "a picture is stepped and finished after its start only"
    return item.sample
