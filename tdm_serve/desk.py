"""Where event loops and the device thread meet: what is accepted, under one lock, with the scheduler behind it.

Every ticket is settled exactly once, by whoever comes first: its last picture, its owner, its deadline, a failure or a
closed event loop. From then on the desk holds nothing of it; what the device is doing for it at that moment is dropped
when that is done.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from tdm_serve.core import GeneratedImage, Progress, Terms
from tdm_serve.counters import Counters
from tdm_serve.errors import (
    Cancelled,
    DeadlinePassed,
    EngineClosed,
    EngineFailed,
    TdmServeError,
)
from tdm_serve.orders import Asked, Done, Errand, Item, Order
from tdm_serve.preview_thread import PreviewThread
from tdm_serve.profile import Profile
from tdm_serve.refusing import error_of
from tdm_serve.scheduler import Idle, Policy, Refusal, Run, Scheduler, Stage, Work
from tdm_serve.ticket import Letter, Mailbox, Outcome, post
from tdm_serve.watchdog import Doing, Watch

CLOSED = "the server is shutting down and takes no new requests"
DIED = "the device failed while it worked on this; the server's log says why"


def now_ms() -> float:
    """The clock of everything here."""
    return time.monotonic() * 1000


class Desk:
    """`submit`, `cancel` and the questions from any thread; `take`, `done` and `crashed` from the device thread."""

    def __init__(self, profile: Profile, policy: Policy, previews: PreviewThread, watch: Watch) -> None:
        self.lock = threading.Condition()
        self.counters = Counters()
        self.profile = profile
        self.closing = False
        self.degraded: str | None = None  # what went wrong and was mended
        self.dead: str | None = None  # why no request can be served any more
        self.watch = watch
        self._policy = policy
        self._scheduler = Scheduler(profile, policy)
        self._previews = previews
        self._orders: dict[int, Order] = {}
        self._items: dict[int, Item] = {}
        self._open: Run | None = None
        self._errands: deque[Errand] = deque()
        self._numbers = itertools.count(1)
        self._ids = itertools.count(1)

    # ---- from any thread

    def submit(self, asked: Sequence[Asked], terms: Terms, mailbox: Mailbox, previews: bool) -> Order:
        """All or nothing. Raises Overloaded, DeadlineUnreachable, EngineClosed or EngineFailed."""
        with self.lock:
            self._check_open()
            now = now_ms()
            order = Order(next(self._numbers), mailbox, previews, [None] * len(asked), now, missing=len(asked))
            deadline = None if terms.deadline_ms is None else now + terms.deadline_ms
            for index, one in enumerate(asked):
                order.items.append(Item(self._work(one, order, terms, deadline), order, index, one.request))
            mailbox.number = order.number
            self._orders[order.number] = order
            self._items.update((item.work.id, item) for item in order.items)
            try:
                mailbox.promised_ms = self._promise_ms(order, now)
            except BaseException:  # a signal's exception, too, may not leave half an order here
                self._forget(order)
                raise
            self.counters.accepted += 1
            self.lock.notify_all()
            return order

    def _check_open(self) -> None:
        if self.closing:
            raise self._refused("closed", EngineClosed(CLOSED))
        if self.dead is not None:
            raise self._refused("failed", EngineFailed(self.dead))
        if self.watch.hung is not None:
            raise self._refused("hung", EngineFailed(self.watch.hung))

    def errand(self, work: Callable[[], Any]) -> Future[Any]:
        """Has the device thread call `work` before its next run. Raises EngineClosed or EngineFailed."""
        with self.lock:
            self._check_open()
            errand = Errand(work, Future())
            self._errands.append(errand)
            self.lock.notify_all()
            return errand.done

    def look(self) -> None:
        """Called again and again by the watchdog. While the device hangs, deadlines are kept from here."""
        with self.lock:
            now = now_ms()
            self.counters.hangs += self.watch.look(now)
            if self.watch.hung is not None:
                self._drop_overdue(now)

    def _promise_ms(self, order: Order, now: float) -> float:
        promise = self._scheduler.offer([item.work for item in order.items], now)
        if isinstance(promise, Refusal):
            raise self._refused(promise.reason, error_of(promise))
        return promise.eta_ms

    def _forget(self, order: Order) -> None:
        """What of an order is left to make is not made. Needs the lock."""
        self._orders.pop(order.number, None)
        for item in order.items:
            self._items.pop(item.work.id, None)
        self._scheduler.cancel(order.number)

    def _work(self, asked: Asked, order: Order, terms: Terms, deadline_ms: float | None) -> Work:
        return Work(
            id=next(self._ids),
            ticket=order.number,
            shape=asked.shape,
            model=asked.model,
            steps=asked.steps,
            arrived_ms=order.arrived_ms,
            deadline_ms=deadline_ms,
            priority=terms.priority,
            tenant=terms.tenant,
            cached=asked.cached,
        )

    def _refused(self, reason: str, error: TdmServeError) -> TdmServeError:
        self.counters.refused[reason] += 1
        return error

    def refused(self, reason: str) -> None:
        """Counts a ticket that was refused before it came here."""
        with self.lock:
            self.counters.refused[reason] += 1

    def cancel(self, number: int) -> bool:
        """Calls an order off; False where it is settled."""
        with self.lock:
            order = self._orders.get(number)
            if order is None:
                return False
            self._settle(order, Cancelled("the request was cancelled"))
            return True

    def position(self, number: int) -> int:
        """Pictures before this order's."""
        with self.lock:
            return self._scheduler.position(number) if number in self._orders else 0

    def eta_ms(self, number: int) -> float:
        """Milliseconds until all of the order's pictures are there."""
        with self.lock:
            return self._scheduler.eta_ms(number, now_ms()) if number in self._orders else 0.0

    def load(self) -> tuple[int, int, float]:
        """Pictures that wait, pictures under way, and predicted milliseconds until all are done. Needs the lock."""
        return self._scheduler.waiting, self._scheduler.running, self._scheduler.backlog_ms(now_ms())

    def close(self) -> None:
        """From now on nothing is accepted; what was accepted is finished."""
        with self.lock:
            self.closing = True
            self.lock.notify_all()

    def fail(self, reason: str) -> None:
        """Nothing can be made any more: everything accepted fails, everything new is refused."""
        with self.lock:
            self.dead = reason
            self.watch.ends(now_ms())
            self._scheduler = Scheduler(self.profile, self._policy)  # the old one may be what failed
            self._drop_all(lambda: EngineFailed(reason))

    def drop_rest(self) -> None:
        """Settles what nobody will make, since the device thread has ended or was never started."""
        with self.lock:
            self._drop_all(lambda: EngineClosed(CLOSED))

    def _drop_all(self, error: Callable[[], Exception]) -> None:
        for order in list(self._orders.values()):
            self._settle(order, error())
        while self._errands:
            self._errands.popleft().done.set_exception(error())

    # ---- from the device thread

    def take(self) -> tuple[Run, list[Item]] | Errand | None:
        """Waits for what is next. None: closing, and everything is finished."""
        with self.lock:
            while True:
                if self._errands:
                    self._scheduler.paused()
                    return self._errands.popleft()
                now = now_ms()
                self._drop_overdue(now)
                decision = self._scheduler.next(now)
                if isinstance(decision, Run):
                    items = [self._items[number] for number in decision.ids]
                    self._begin(decision, items, now)
                    return decision, items
                if self.closing and not self._items:
                    return None
                self._wait(decision, now)

    def _begin(self, run: Run, items: Sequence[Item], now: float) -> None:
        self._open = run
        doing = Doing(run.stage, items[0].work.shape, len(items), len({item.work.model for item in items}))
        self.watch.begins(doing, doing.expected_ms(self.profile), now)

    def _wait(self, idle: Idle, now: float) -> None:
        self.lock.wait(None if idle.until_ms is None else max(idle.until_ms - now, 0.0) / 1000)

    def _drop_overdue(self, now: float) -> None:
        for number in self._scheduler.overdue(now):
            if order := self._orders.get(number):
                self._settle(order, DeadlinePassed("the pictures were not done by their deadline, and were dropped"))

    def done(self, run: Run, items: Sequence[Item], done: Done) -> None:
        """Takes in what came of a run and tells those who wait for it."""
        with self.lock:
            hung = self.watch.ends(now_ms())
            self._open = None
            self._scheduler.done(run, now_ms(), [item.work.id for item, _ in done.failed])
            if done.fits is not None:
                self.profile.limit_batch(items[0].work.shape, done.fits)
            elif not done.failed and not hung:
                self._observe(run.stage, items, done.fresh)
            self.counters.ran(run.stage, len(run.ids), done.ms, done.evaluations)
            self._tell(done.progress)
            for item, image in done.images:
                self._deliver(item, image)
            for item, error in done.failed:
                self._settle(item.order, error)

    def _observe(self, stage: Stage, items: Sequence[Item], fresh: int) -> None:
        """The profile learns while the engine runs: what a run took with the gap before it."""
        models = len({item.work.model for item in items}) if stage is Stage.STEP else 1
        batch = fresh if stage is Stage.START else len(items)
        self.profile.observe(stage, items[0].work.shape, batch, self._scheduler.took_ms, models)

    def _tell(self, progress: Iterable[tuple[Item, Progress, object]]) -> None:
        letters: list[Letter] = []
        for item, event, clean in progress:
            order = item.order
            if order.outcome is None and order.previews:
                self._previews.tell(order.mailbox, event, clean)
            elif order.outcome is None:
                letters.append((order.mailbox, event))
        self._post(letters)

    def _deliver(self, item: Item, image: GeneratedImage) -> None:
        order = item.order
        self._items.pop(item.work.id, None)
        self.counters.made(item.work.model)
        if order.outcome is not None:
            return
        order.images[item.index] = image
        order.missing -= 1
        if order.missing == 0:
            self._settle(order, [made for made in order.images if made is not None])

    def _settle(self, order: Order, outcome: Outcome) -> None:
        """Once; later outcomes are ignored. Needs the lock."""
        if order.outcome is not None:
            return
        order.outcome = outcome
        order.mailbox.took_ms = took_ms = now_ms() - order.arrived_ms
        self._forget(order)
        if order.previews and not isinstance(outcome, Exception):
            self._previews.settle(order.mailbox, outcome)
        else:
            self._post([(order.mailbox, outcome)])
        self.counters.settled(outcome, order.mailbox.promised_ms, took_ms)
        order.items.clear()
        order.images.clear()

    def _post(self, letters: Sequence[Letter]) -> None:
        """What nobody can receive any more is called off."""
        for mailbox in post(letters):
            self.cancel(mailbox.number)

    def crashed(self, degraded: str) -> None:
        """The device thread died: what it had begun fails, what still waits is queued anew."""
        with self.lock:
            self.degraded = degraded
            self.counters.restarts += 1
            self.watch.ends(now_ms())
            begun = set(self._open.ids) if self._open else set[int]()
            self._open = None
            self._scheduler = Scheduler(self.profile, self._policy)  # the old one may be what failed
            for order in list(self._orders.values()):
                if any(item.sample is not None or item.work.id in begun for item in order.items):
                    self._settle(order, EngineFailed(DIED))
            self._queue_anew()

    def profiled(self, profile: Profile) -> None:
        """There is a measured profile now: what waits gets its promise from that."""
        with self.lock:
            self.profile = profile
            self._queue_anew()

    def _queue_anew(self) -> None:
        """A new scheduler takes over what waits, in the order in which it came. Needs the lock."""
        self._scheduler = Scheduler(self.profile, self._policy)
        now = now_ms()
        for order in sorted(self._orders.values(), key=lambda order: order.number):
            promise = self._scheduler.offer([item.work for item in order.items], now)
            if isinstance(promise, Refusal):
                self._settle(order, error_of(promise))
            else:
                order.mailbox.promised_ms = now - order.arrived_ms + promise.eta_ms
