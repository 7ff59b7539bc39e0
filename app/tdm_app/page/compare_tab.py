"""Two checkpoints, one seed, side by side."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from tdm_app.page.boxes import EXAMPLES, size_choices, versus
from tdm_app.page.seedbox import SeedBox
from tdm_app.page.stage import NOW, RUNS, Page, Stage, Updates, run_buttons
from tdm_app.page.words import title

HINT = "The same prompt, the same noise, two checkpoints."
SIDES = ("Left", "Right")


def compare_tab(page: Page) -> None:
    """Builds it where it is called. Needs two checkpoints."""
    gr, sizes = page.gr, size_choices(page.service.info)
    other = [*page.service.infos][-1 if len(page.service.infos) == 1 else 1]
    with gr.Row(elem_classes="desk"):
        with gr.Column(elem_classes="ask", min_width=0):
            prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[1], max_lines=5, elem_id="compare-prompt")
            go, stop = run_buttons(gr, "Compare", "compare", "compare-cancel")
        with gr.Column(elem_classes="settings", min_width=0):
            left, right = page.chooser("Left", "compare-left", other), page.chooser("Right", "compare-right")
            size = gr.Dropdown(sizes, value=sizes[0][1], label="Size", allow_custom_value=True, elem_id="compare-size")
            seed = SeedBox(page, "compare")
        with gr.Column(elem_classes="result", min_width=0):
            stage = Stage(page, "compare", 2, go, stop, HINT)
            with gr.Row(elem_id="verdict"):
                better = [gr.Button(f"{side} is better", size="md", elem_id=f"better-{side.lower()}") for side in SIDES]

    async def compare(
        prompt: str, text: str, lock: bool, size: str, left: str, right: str, request: Any
    ) -> AsyncGenerator[Updates]:
        titles = [title(page.service.infos[model]) for model in (left, right)]
        async for changes in stage.play(request, lambda: versus(prompt, text, size, (left, right)), titles):
            yield changes
        tab = page.tab_of(request)
        if kept := [tab.shown[slot.name] for slot in stage.slots if slot.name in tab.shown]:
            yield {
                better[0]: gr.Button(variant="secondary"),
                better[1]: gr.Button(variant="secondary"),
            } | seed.after(tab, kept[0].picture.seed, lock)

    boxes = [prompt, seed.box, seed.lock, size, left, right]
    outputs = [*stage.outputs, *better, seed.box, seed.again]
    gr.on([go.click, prompt.submit, seed.box.submit], page.visitor(compare), boxes, outputs, **RUNS)
    seed.on_again(compare, boxes, outputs)
    for side, button in enumerate(better):
        button.click(
            page.visitor(_prefer(stage, side, better)), None, [stage.problem, *better], **NOW
        )  # fmt: skip


def _prefer(stage: Stage, side: int, better: list[Any]) -> Any:
    async def prefer(request: Any) -> Updates:
        page, gr = stage.page, stage.page.gr
        shown = page.tab_of(request).shown
        ids = [kept.id for slot in stage.slots if (kept := shown.get(slot.name)) and kept.id is not None]
        if len(ids) != len(stage.slots):
            return {}
        if trouble := await stage.attempt(
            page.service.feedback.prefer(ids[side], ids[1 - side], page.caller_of(request).id)
        ):
            return trouble
        return {
            button: gr.Button(variant="primary" if place == side else "secondary")
            for place, button in enumerate(better)
        }

    return prefer
