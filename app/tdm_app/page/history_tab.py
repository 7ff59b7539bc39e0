"""What was made in this browser tab, newest first, with the recipe of each picture."""

from __future__ import annotations

from typing import Any

from tdm_app.page import figures, words
from tdm_app.page.generate_tab import GenerateTab
from tdm_app.page.keep import Kept, Tab
from tdm_app.page.stage import NOW, Page

EMPTY = "Nothing yet. Pictures that you make appear here, until you close or reload the page."


def history_tab(page: Page, tabs: Any, home: Any, target: GenerateTab, selected: Any) -> None:
    """Builds it where it is called. `selected` is this tab's own select event, `home` the tab to go back to."""
    gr = page.gr
    hint = page.markup(figures.status(EMPTY), elem_id="history-hint")
    with gr.Row(elem_classes="past"):
        with gr.Column(min_width=0):
            gallery = gr.Gallery(
                show_label=False, columns=6, object_fit="contain", allow_preview=False, interactive=False, buttons=[],
                elem_id="history", container=False,
            )  # fmt: skip
        with gr.Column(min_width=0, elem_id="history-detail"):
            figure = page.markup()
            recipe = page.markup(elem_id="history-recipe")
            use = gr.Button("Use this recipe", elem_id="history-use")

    async def show(request: Any) -> dict[Any, Any]:
        tab = page.tab_of(request)
        history = tab.listed = list(tab.history)
        return {
            gallery: gr.Gallery([(str(kept.png), kept.picture.prompt) for kept in history], selected_index=None),
            hint: "" if history else figures.status(EMPTY),
            figure: "",
            recipe: "",
        }

    async def pick(event: Any, request: Any) -> dict[Any, Any]:
        tab = page.tab_of(request)
        if (kept := _at(tab, event.index)) is None:
            return {}
        tab.picked = kept
        return {
            figure: figures.finished(kept),
            recipe: words.recipe_rows(kept.picture.recipe()),
        }

    async def take(request: Any) -> dict[Any, Any]:
        kept = page.tab_of(request).picked
        if kept is None:
            return {}
        picture = kept.picture
        values = (picture.prompt, str(picture.seed), True, f"{picture.width}x{picture.height}", picture.model)
        return {tabs: gr.Tabs(selected=home)} | dict(zip(target.recipe, values, strict=True))

    selected(page.visitor(show), None, [gallery, hint, figure, recipe], **NOW)
    gallery.select(page.visitor(pick), None, [figure, recipe], **NOW)
    use.click(page.visitor(take), None, [tabs, *target.recipe], **NOW)


def _at(tab: Tab, index: int) -> Kept | None:
    return tab.listed[index] if 0 <= index < len(tab.listed) else None
