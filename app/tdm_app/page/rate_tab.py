"""The online mode: groups of pictures of one prompt to rate, and what the clicks are good for.

TDM-R1 learns from groups: pictures of one prompt by one checkpoint, rated differently. Clicks are stored as the recipes
of what was rated; the trainer makes the pictures again from these.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from tdm_app.online.groups import Groups, count_groups
from tdm_app.page.boxes import EXAMPLES, requests_of
from tdm_app.page.stage import NOW, RUNS, Page, Stage, Updates, run_buttons
from tdm_app.page.suggestions import suggestion
from tdm_app.page.train_box import TrainBox
from tdm_app.page.words import safe

HINT = "Click what is good and what is bad: keys 1 to 4, with Shift for bad."
ABOUT = (
    '<p class="about">Four pictures of one prompt, to be rated against each other. A group teaches the model something '
    "when its pictures are not all rated alike. What is stored is their recipes, not the pictures.</p>"
)


def rate_tab(page: Page, selected: Any) -> None:
    """Builds it where it is called; `selected` is its own select event."""
    gr, own = page.gr, page.service.info.id.startswith("default")
    with gr.Row(elem_classes="desk"):
        with gr.Column(elem_classes="ask", min_width=0):
            page.markup(ABOUT)
            prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[1], max_lines=5, elem_id="rate-prompt")
            go, stop = run_buttons(gr, "Show a group", "rate", "rate-cancel")
            another = gr.Button("Another prompt", size="sm", visible=own, elem_id="rate-another")
        with gr.Column(elem_classes="settings", min_width=0):
            model = page.chooser("Checkpoint", "rate-model")
            score = page.markup(elem_id="score")
            training = TrainBox(page) if page.online.on else None
        with gr.Column(elem_classes="result", min_width=0):
            stage = Stage(page, "rate", page.places, go, stop, HINT)
            rest = gr.Button("The others are bad · next group", interactive=False, elem_id="rate-rest")

    async def tally(model: str) -> str:
        groups = count_groups(await page.service.feedback.records(), page.service.infos[model].checkpoint_hash)
        return sentence(groups, model, commands=not page.online.on)

    async def group(prompt: str, model: str, request: Any) -> AsyncGenerator[Updates]:
        info = page.service.infos[model]
        size = f"{info.width}x{info.height}"
        async for changes in stage.play(request, lambda: requests_of(prompt, "", size, page.places, model)):
            yield changes
        yield {rest: gr.Button(interactive=stage.slots[0].name in page.tab_of(request).shown)}

    async def finish(prompt: str, model: str, request: Any) -> Updates:
        tab = page.tab_of(request)
        for slot in stage.slots:
            kept = tab.shown.get(slot.name)
            if kept is not None and kept.id not in tab.ratings:
                await stage.rate(request, slot, up=False)
        return {score: await tally(model), prompt_box: suggestion() if own else prompt}

    async def surprise() -> str:
        return suggestion()

    prompt_box, outputs = prompt, [*stage.outputs, rest]
    gr.on([go.click, prompt.submit], page.visitor(group), [prompt, model], outputs, **RUNS)
    another.click(surprise, None, prompt, **NOW)
    finished = rest.click(page.visitor(finish), [prompt, model], [score, prompt], **NOW)
    finished.then(page.visitor(group), [prompt, model], outputs, **RUNS)
    gr.on([selected, model.input], tally, model, score, **NOW)
    if training is not None:
        training.wire(model, selected)
    for rated in stage.rated:
        rated.then(tally, model, score, **NOW)


def sentence(groups: Groups, model: str, commands: bool = True) -> str:
    """How far the ratings go and, where nothing here trains from them, the `commands` that do, as HTML."""
    so_far = (
        f'<div class="score"><p><strong>{groups.usable}</strong> of {groups.groups} rated groups usable</p>'
        f"<p>{groups.pictures} pictures of <code>{safe(model)}</code> are rated."
    )
    if not commands:
        return f"{so_far}</p></div>"
    return (
        f"{so_far} To train from them:</p>"
        "<pre><code>tdm-serve feedback export likes.jsonl<br>"
        f"tdm-serve finetune tdm-r1 --checkpoint {safe(model)} --feedback likes.jsonl</code></pre>"
        "<p>The reward is only logged beside the ratings; this one judges any prompt.</p></div>"
    )
