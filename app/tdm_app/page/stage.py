"""A stage: a place on the page where pictures are made. Every tab has one; they differ in what they ask for.

It has a status line, a line for what went wrong, and slots. A slot is a frame for one picture and its two thumbs. The
functions here return updates: dictionaries from a component to what becomes of it. Nothing here is shown or hidden by
its `visible`: gradio loses what it is told of a component that is about to appear. The style sheet hides what is empty.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from tdm_app.asking import tenant_of
from tdm_app.auth import Caller, caller_of
from tdm_app.online.trainer import OnlineTraining
from tdm_app.page import figures, words
from tdm_app.page.boxes import MAX_ON_PAGE, check_limits, model_choices
from tdm_app.page.keep import Kept, Tab, Tabs
from tdm_app.page.making import View, watch
from tdm_app.ratelimit import Limiter
from tdm_app.refusal import Refused
from tdm_app.service import Service
from tdm_serve import GeneratedImage
from tdm_serve.core import Request, Terms
from tdm_serve.errors import Cancelled, OutputError, TdmServeError
from tdm_serve.ticket import Ticket

log = logging.getLogger(__name__)

Updates = dict[Any, Any]
AT_ONCE = 16  # page visitors served at the same time; the others queue
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # our own status line says more
RUNS: dict[str, Any] = {**QUIET, "concurrency_limit": AT_ONCE}  # an event that makes pictures
NOW: dict[str, Any] = {**QUIET, "queue": False}  # one that must not wait behind those


@dataclass(frozen=True, slots=True)
class Page:
    """What all tabs share."""

    gr: Any  # the module; its events are made at import time, types cannot follow
    service: Service
    online: OnlineTraining
    tabs: Tabs
    limiter: Limiter | None
    choosers: list[Any] = field(default_factory=list[Any])  # the boxes in which visitors choose a version

    def markup(self, value: str = "", **options: Any) -> Any:
        """A component that shows our own HTML as it is. Everything in it that is not ours went through `safe`."""
        return self.gr.Markdown(value, sanitize_html=False, latex_delimiters=[], **options)

    @property
    def several(self) -> bool:
        """Whether there are versions to choose from, or may be."""
        return len(self.service.infos) > 1 or self.online.on

    def chooser(self, label: str, elem_id: str, value: str = "") -> Any:
        """A box with all versions; of those that join later, too."""
        choices = model_choices(self.service.infos.values())
        value = value or self.service.info.id
        box = self.gr.Dropdown(choices, value=value, label=label, visible=self.several, elem_id=elem_id)
        self.choosers.append(box)
        return box

    async def versions(self) -> Updates:
        """Every version in every box."""
        choices = model_choices(self.service.infos.values())
        return {box: self.gr.Dropdown(choices=choices) for box in self.choosers}

    def tab_of(self, request: Any) -> Tab:
        """The open tab that an event comes from."""
        return self.tabs.of(request.session_hash)

    @property
    def places(self) -> int:
        """Pictures at once."""
        return min(MAX_ON_PAGE, self.service.settings.max_images)

    def caller_of(self, request: Any) -> Caller:
        """Who has opened it: the key that the browser sent, nobody in particular without keys."""
        return caller_of(request.request)

    async def submit(self, asked: Sequence[Request], caller: Caller) -> Ticket:
        """Under the same limits as the API's requests. Raises InvalidRequest, Refused, Overloaded, ..."""
        check_limits(asked, self.service.settings)
        if self.limiter is not None:
            self.limiter.pictures(caller, len(asked))
        return await self.service.submit(asked, Terms(tenant=tenant_of(caller, caller.address)), previews=True)

    def visitor(self, handler: Any) -> Any:
        """Marks the parameters `request` and `event` of a function: gradio fills them in by their type."""
        types = {"request": self.gr.Request, "event": self.gr.SelectData}
        names = inspect.signature(handler).parameters
        handler.__annotations__ = {name: types[name] for name in names if name in types}
        return handler


@dataclass(frozen=True, slots=True)
class Slot:
    """A frame for one picture, and its thumbs."""

    name: str
    figure: Any
    up: Any
    down: Any


class Stage:
    """`go` starts, `stop` cancels. Create it where it shall appear on the page."""

    def __init__(self, page: Page, name: str, places: int, go: Any, stop: Any, hint: str) -> None:
        self.page, self.name, self.go, self.stop, self.hint = page, name, go, stop, hint
        gr = page.gr
        with gr.Column(elem_classes="stage"):
            self.status = page.markup(figures.status(hint), elem_id=f"{name}-status")
            self.problem = page.markup(elem_id=f"{name}-problem", elem_classes="problem")
            with gr.Row(elem_classes=["shots", f"of-{places}"], elem_id=f"{name}-shots"):
                self.slots = [self._slot(f"{name}-{number}", number) for number in range(places)]
        self.rated = self._wire(stop)

    @property
    def outputs(self) -> list[Any]:
        """Everything that `play` may change."""
        own = [part for slot in self.slots for part in (slot.figure, slot.up, slot.down)]
        return [self.status, self.problem, self.go, self.stop, *own]

    async def play(
        self, request: Any, ask: Callable[[], Sequence[Request]], titles: Sequence[str] = ()
    ) -> AsyncGenerator[Updates]:
        """Makes what `ask` returns and shows how it comes about. The pictures are in the tab's `shown` at the end.

        `ask` may raise InvalidRequest; that and all other errors become a sentence.
        """
        tab, caller, started = self.page.tab_of(request), self.page.caller_of(request), time.perf_counter()
        view: View | None = None
        for slot in self.slots:
            tab.shown.pop(slot.name, None)
        try:
            asked = ask()
            yield self._opening(asked)
            tab.cancel(self.name)
            ticket = await self._ticket(tab, asked, caller)
            tab.tickets[self.name] = ticket
            try:
                async with aclosing(watch(ticket, len(asked))) as views:
                    async for view in views:
                        yield self._under_way(asked, view)
                pictures = await ticket.result()
            finally:
                ticket.cancel()
                tab.tickets.pop(self.name, None)
            kept = await self._keep(tab, pictures, view, caller.id)
            yield self._finished(tab, kept, titles, 1000 * (time.perf_counter() - started))
        except Exception as error:  # noqa: BLE001 - the visitor gets a sentence, whatever it is
            log_unknown(error)
            yield self._failed(error)

    async def _ticket(self, tab: Tab, asked: Sequence[Request], caller: Caller) -> Ticket:
        """Waits for it as long as the visitor does: until the model is warm, or Cancel."""
        submitting = asyncio.ensure_future(self.page.submit(asked, caller))
        tab.tickets[self.name] = submitting
        try:
            await asyncio.wait({submitting})
        finally:
            submitting.cancel()  # nothing happens to one that is done
            tab.tickets.pop(self.name, None)
        if submitting.cancelled():
            raise Cancelled("the request was cancelled while the model warmed up")
        return submitting.result()

    async def _keep(self, tab: Tab, pictures: Sequence[GeneratedImage], view: View | None, owner: str) -> list[Kept]:
        ids = await self.page.service.feedback.ids(pictures, owner)
        strips = view.strips if view is not None else ((),) * len(pictures)
        writes = (asyncio.to_thread(tab.keep, *one) for one in zip(pictures, strips, ids, strict=True))
        kept = list(await asyncio.gather(*writes))
        tab.remember(kept)
        for slot, one in zip(self.slots, kept, strict=False):
            tab.shown[slot.name] = one
        return kept

    def _opening(self, asked: Sequence[Request]) -> Updates:
        gr = self.page.gr
        changes: Updates = {
            self.status: figures.status(words.opening(self.page.service.warming), 0.0),
            self.problem: "",
            self.go: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
        }
        for slot, one in zip_longest(self.slots, asked):
            changes[slot.figure] = figures.waiting(one.width, one.height) if one else ""
        return changes

    def _under_way(self, asked: Sequence[Request], view: View) -> Updates:
        said = words.progress(view.done, view.total, view.ahead, view.left_ms)
        changes: Updates = {self.status: figures.status(said, view.share)}
        for slot, one, newest, strip in zip(self.slots, asked, view.newest, view.strips, strict=False):
            if newest is not None:
                changes[slot.figure] = figures.preview(one.width, one.height, strip, newest.step, newest.total)
        return changes

    def _finished(self, tab: Tab, kept: Sequence[Kept], titles: Sequence[str], took_ms: float) -> Updates:
        changes = self._idle()
        changes[self.status] = figures.status(words.made(len(kept), took_ms), 1.0, "good")
        for number, (slot, one) in enumerate(zip(self.slots, kept, strict=False)):
            changes[slot.figure] = figures.finished(one, titles[number] if titles else "")
            changes |= self.thumbs(tab, slot)
        return changes

    def _failed(self, error: Exception) -> Updates:
        changes = self._idle()
        sentence = words.trouble(error)
        calm = isinstance(error, Cancelled)
        changes[self.status] = figures.status(sentence if calm else self.hint)
        changes[self.problem] = "" if calm else figures.alert(sentence)
        for number, slot in enumerate(self.slots):
            changes[slot.figure] = "" if number else figures.empty()
        return changes

    def _idle(self) -> Updates:
        gr = self.page.gr
        return {self.go: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}

    def thumbs(self, tab: Tab, slot: Slot) -> Updates:
        """How the thumbs of a slot look now."""
        gr, kept = self.page.gr, tab.shown.get(slot.name)
        given = tab.ratings.get(kept.id) if kept is not None and kept.id is not None else None
        return {
            slot.up: gr.Button(variant="primary" if given is True else "secondary"),
            slot.down: gr.Button(variant="stop" if given is False else "secondary"),
        }

    async def rate(self, request: Any, slot: Slot, up: bool) -> Updates:
        """A thumb was clicked."""
        tab = self.page.tab_of(request)
        kept = tab.shown.get(slot.name)
        if kept is None or kept.id is None:
            return {}
        if trouble := await self.attempt(self.page.service.feedback.rate(kept.id, up, self.page.caller_of(request).id)):
            return trouble
        tab.ratings[kept.id] = up
        return self.thumbs(tab, slot)

    async def attempt(self, work: Awaitable[None]) -> Updates:
        """Nothing where the work could be done, else the sentence that says why not."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the visitor gets a sentence, whatever it is
            log_unknown(error)
            return {self.problem: figures.alert(words.trouble(error))}
        return {}

    def _wire(self, stop: Any) -> list[Any]:
        """Returns the events of the thumbs, for what shall happen after them."""
        page = self.page

        async def cancel(request: Any) -> None:
            page.tab_of(request).cancel(self.name)

        def rater(slot: Slot, up: bool) -> Any:
            async def rate(request: Any) -> Updates:
                return await self.rate(request, slot, up)

            return page.visitor(rate)

        stop.click(page.visitor(cancel), None, None, **NOW)
        if not page.service.feedback.on:
            return []
        return [
            button.click(rater(slot, up), None, [self.problem, slot.up, slot.down], **NOW)
            for slot in self.slots
            for button, up in ((slot.up, True), (slot.down, False))
        ]

    def _slot(self, name: str, number: int) -> Slot:
        page, gr = self.page, self.page.gr
        with gr.Column(elem_classes="slot", elem_id=name, min_width=0):
            figure = page.markup("" if number else figures.empty())
            with gr.Row(elem_classes="thumbs"):
                up = gr.Button("Good", size="sm", elem_classes="up", elem_id=f"{name}-up", min_width=0)
                down = gr.Button("Bad", size="sm", elem_classes="down", elem_id=f"{name}-down", min_width=0)
        return Slot(name, figure, up, down)


def run_buttons(gr: Any, label: str, go: str, stop: str) -> tuple[Any, Any]:
    """The button that starts and the one that cancels, side by side, with their ids."""
    with gr.Row(elem_classes="buttons"):
        return (
            gr.Button(label, variant="primary", size="md", elem_id=go, scale=3, min_width=0),
            gr.Button(
                "Cancel", interactive=False, size="md", elem_id=stop, elem_classes="calls-off", scale=2, min_width=0
            ),
        )


def log_unknown(error: Exception) -> None:
    """Whatever the visitor is not told in full."""
    if isinstance(error, OutputError) or not isinstance(error, TdmServeError | Refused):
        log.error("the page could not do what was asked for", exc_info=error)
