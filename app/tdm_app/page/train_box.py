"""The part of the online mode that trains: begin, watch, call off, and take what came of it into service. For admins.

What it shows is renewed as long as a training runs, so that a tab that was opened later shows it, too.
"""

from __future__ import annotations

from typing import Any

from tdm_app.online.table import Training
from tdm_app.page import figures, words
from tdm_app.page.stage import NOW, Page, Updates, log_unknown
from tdm_app.refusal import Refused, refusal

TICK_S = 2.0
WHO = "training is for admins; this needs a key with the scope admin"


class TrainBox:
    """Create it where it shall appear; `wire` it when the box with the model is there."""

    def __init__(self, page: Page) -> None:
        self.page, gr = page, page.gr
        self.status = page.markup(elem_id="train-status")
        self.problem = page.markup(elem_id="train-problem", elem_classes="problem")
        with gr.Row(elem_classes="buttons"):
            self.begin = gr.Button("Train", size="sm", elem_id="train", min_width=0)
            self.stop = gr.Button("Cancel", size="sm", elem_id="train-cancel", interactive=False, min_width=0)
            self.load = gr.Button("Load", size="sm", elem_id="train-load", interactive=False, min_width=0)
        self.timer = gr.Timer(TICK_S, active=False)

    @property
    def outputs(self) -> list[Any]:
        return [self.status, self.problem, self.begin, self.stop, self.load, self.timer, *self.page.choosers]

    def wire(self, model: Any, selected: Any) -> None:
        """`selected` is the event of the tab that it is in."""
        page, online = self.page, self.page.online

        async def begin(model: str, request: Any) -> Updates:
            return await self._try(request, lambda: online.start(model))

        async def stop(request: Any) -> Updates:
            newest = (await online.trainings())[:1]
            return await self._try(request, lambda: online.cancel(newest[0].id)) if newest else {}

        async def load(request: Any) -> Updates:
            newest = (await online.trainings())[:1]
            return await self._try(request, lambda: online.load(newest[0].id)) if newest else {}

        self.begin.click(page.visitor(begin), model, self.outputs, **NOW)
        self.stop.click(page.visitor(stop), None, self.outputs, **NOW)
        self.load.click(page.visitor(load), None, self.outputs, **NOW)
        page.gr.on([selected, self.timer.tick], self.shown, None, self.outputs, **NOW)

    async def _try(self, request: Any, act: Any) -> Updates:
        """What came of it, or the sentence that says why not."""
        try:
            if not self.page.caller_of(request).admin:
                raise Refused(refusal(403, "admin_only", WHO))
            await act()
        except Exception as error:  # noqa: BLE001 - the visitor gets a sentence, whatever it is
            log_unknown(error)
            return await self.shown() | {self.problem: figures.alert(words.trouble(error))}
        return await self.shown() | {self.problem: ""} | await self.page.versions()

    async def shown(self) -> Updates:
        """The newest training."""
        gr, newest = self.page.gr, next(iter(await self.page.online.trainings()), None)
        runs = newest is not None and newest.status == "running"
        ready = newest is not None and newest.status == "succeeded" and not newest.loaded
        return {
            self.status: self._status(newest),
            self.begin: gr.Button(interactive=not runs),
            self.stop: gr.Button(interactive=runs),
            self.load: gr.Button(interactive=ready),
            self.timer: gr.Timer(active=runs),
        }

    def _status(self, training: Training | None) -> str:
        if training is None:
            return figures.status("Nothing was trained here yet.")
        step, steps = self.page.online.progress(training)
        said = words.training(training, step, steps)
        done = training.status == "succeeded"
        share = step / steps if training.status == "running" and steps else None
        return figures.status(said, share, "good" if done else "")
