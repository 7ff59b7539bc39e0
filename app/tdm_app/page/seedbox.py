"""The seed: a box, a lock and a way back to the seed of the pictures on show.

The box is the truth: what is in it is used, and an empty one asks for any seed. A locked seed stays in the box after
the pictures are there; locking an empty box takes the seed that was used last.
"""

from __future__ import annotations

from typing import Any

from tdm_app.page.keep import Tab
from tdm_app.page.stage import NOW, RUNS, Page, Updates


class SeedBox:
    """Create it where it shall appear; `name` is the tab's."""

    def __init__(self, page: Page, name: str) -> None:
        self.page, self.name = page, name
        gr = page.gr
        with gr.Column(elem_classes="seed", min_width=0):
            self.box = gr.Textbox(label="Seed", placeholder="any", max_lines=1, elem_id=f"{name}-seed")
            with gr.Row(elem_classes="seed-tools"):
                self.lock = gr.Checkbox(label="Lock seed", elem_id=f"{name}-lock", min_width=0, container=False)
                self.again = gr.Button(
                    "Same seed again", size="sm", interactive=False, elem_id=f"{name}-again", min_width=0
                )

        async def locked(lock: bool, text: str, request: Any) -> str:
            seed = page.tab_of(request).seeds.get(name)
            return "" if not lock else text if text.strip() or seed is None else str(seed)

        async def typed(text: str) -> bool:
            return bool(text.strip())

        self.lock.input(page.visitor(locked), [self.lock, self.box], self.box, **NOW)
        self.box.input(typed, self.box, self.lock, **NOW)

    def after(self, tab: Tab, seed: int, locked: bool) -> Updates:
        """Pictures were made with `seed`."""
        tab.seeds[self.name] = seed
        return {self.again: self.page.gr.Button(interactive=True)} | ({self.box: str(seed)} if locked else {})

    def on_again(self, handler: Any, inputs: list[Any], outputs: list[Any]) -> None:
        """Lets the button put the seed that was used last into the box, lock it, and then run `handler`."""
        page = self.page

        async def reuse(request: Any) -> Updates:
            seed = page.tab_of(request).seeds.get(self.name)
            return {} if seed is None else {self.box: str(seed), self.lock: True}

        filled = self.again.click(page.visitor(reuse), None, [self.box, self.lock], **NOW)
        filled.then(page.visitor(handler), inputs, outputs, **RUNS)
