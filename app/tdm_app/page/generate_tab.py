"""The first tab: a prompt becomes up to four pictures."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from tdm_app.page.boxes import EXAMPLES, requests_of, size_choices
from tdm_app.page.seedbox import SeedBox
from tdm_app.page.stage import RUNS, Page, Stage, Updates, run_buttons
from tdm_app.page.words import table

HINT = "Enter generates, Escape cancels."


@dataclass(frozen=True, slots=True)
class GenerateTab:
    """The boxes that a recipe from the history can be put into."""

    prompt: Any
    seed: SeedBox
    size: Any
    model: Any

    @property
    def recipe(self) -> list[Any]:
        return [self.prompt, self.seed.box, self.seed.lock, self.size, self.model]


def generate_tab(page: Page) -> GenerateTab:
    """Builds it where it is called."""
    gr, sizes = page.gr, size_choices(page.service.info)
    with gr.Row(elem_classes="desk"):
        with gr.Column(elem_classes="ask", min_width=0):
            prompt = gr.Textbox(
                label="Prompt", placeholder=EXAMPLES[0], lines=1, max_lines=5, autofocus=True, elem_id="prompt"
            )
            go, stop = run_buttons(gr, "Generate", "generate", "cancel")
            if page.service.info.id.startswith("default"):
                gr.Examples([[text] for text in EXAMPLES], prompt, label="Try one of these", cache_examples=False)
        with gr.Column(elem_classes="settings", min_width=0):
            model = page.chooser("Checkpoint", "model")
            size = gr.Dropdown(sizes, value=sizes[0][1], label="Size", allow_custom_value=True, elem_id="size")
            count = gr.Radio(list(range(1, page.places + 1)), value=1, label="Pictures", elem_id="count")
            seed = SeedBox(page, "generate")
        with gr.Column(elem_classes="result", min_width=0):
            stage = Stage(page, "generate", page.places, go, stop, HINT)
            facts = gr.Markdown(elem_id="facts", elem_classes="facts-table")

    async def generate(
        prompt: str, text: str, lock: bool, size: str, count: int, model: str, request: Any
    ) -> AsyncGenerator[Updates]:
        async for changes in stage.play(request, lambda: requests_of(prompt, text, size, count, model)):
            yield changes
        tab = page.tab_of(request)
        if pictures := [tab.shown[slot.name].picture for slot in stage.slots if slot.name in tab.shown]:
            yield {facts: table(pictures)} | seed.after(tab, pictures[0].seed, lock)
        else:
            yield {facts: ""}

    boxes = [prompt, seed.box, seed.lock, size, count, model]
    outputs = [*stage.outputs, facts, seed.box, seed.again]
    gr.on([go.click, prompt.submit, seed.box.submit], page.visitor(generate), boxes, outputs, **RUNS)
    seed.on_again(generate, boxes, outputs)
    return GenerateTab(prompt, seed, size, model)
