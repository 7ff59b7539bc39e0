"""What the page remembers of each open tab: its pictures as files, its history, and what is being made for it.

Pictures live in the page's private folder for as long as the tab is open; nothing survives it. A picture is a PNG with
its recipe inside, and a JSON file with the recipe alone.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tdm_app.page.words import caption
from tdm_serve import GeneratedImage

MAX_HISTORY = 60  # pictures of one tab; the oldest files go first
MAX_TABS = 256  # open at a time; a browser that never says goodbye must not fill the disk


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished picture and its files. `id` is what ratings name it by; None where nobody can rate."""

    picture: GeneratedImage
    png: Path
    recipe: Path
    strip: tuple[str, ...] = ()
    id: str | None = None

    @property
    def caption(self) -> str:
        return caption(self.picture)


class Waited(Protocol):
    """A ticket, or the wait for one."""

    def cancel(self) -> bool: ...


@dataclass(slots=True)
class Tab:
    """One open tab of one visitor."""

    folder: Path
    history: list[Kept] = field(default_factory=list[Kept])  # the newest first
    shown: dict[str, Kept] = field(default_factory=dict[str, Kept])  # by the place on the page
    ratings: dict[str, bool] = field(default_factory=dict[str, bool])  # by picture id
    tickets: dict[str, Waited] = field(default_factory=dict[str, "Waited"])  # by the stage that waits for it
    seeds: dict[str, int] = field(default_factory=dict[str, int])  # used last, by the name of the seed box
    listed: list[Kept] = field(default_factory=list[Kept])  # the history as it is on show
    picked: Kept | None = None  # of these

    def keep(self, picture: GeneratedImage, strip: tuple[str, ...], id: str | None) -> Kept:  # noqa: A002 - the API's name
        """Writes the two files. Takes a while for large pictures: call it in a thread."""
        stem = f"{slug(picture.prompt)}-{picture.seed}-{slug(picture.model)}"
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        kept = Kept(picture, folder / f"{stem}.png", folder / f"{stem}.json", strip, id)
        kept.png.write_bytes(picture.png())
        kept.recipe.write_text(json.dumps(picture.recipe(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return kept

    def remember(self, kept: list[Kept]) -> None:
        """Puts pictures on top of the history, the first of them first, and forgets the oldest beyond MAX_HISTORY."""
        self.history[:0] = kept
        for old in self.history[MAX_HISTORY:]:
            if old not in self.shown.values():
                shutil.rmtree(old.png.parent, ignore_errors=True)
        del self.history[MAX_HISTORY:]

    def cancel(self, stage: str | None = None) -> None:
        """Calls off what is made for one stage of the page, or for all."""
        for name, ticket in list(self.tickets.items()):
            if stage in (None, name):
                ticket.cancel()

    def close(self) -> None:
        """Cancels everything and removes the files."""
        self.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)


class Tabs:
    """All open tabs, by the session that gradio gives each. Only for the event loop."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._tabs: OrderedDict[str, Tab] = OrderedDict()

    def of(self, session: str) -> Tab:
        """The tab of a session, new where there is none. The one that was silent longest makes room."""
        tab = self._tabs.get(session)
        if tab is None:
            tab = self._tabs[session] = Tab(self._folder() / secrets.token_hex(8))
            while len(self._tabs) > MAX_TABS:
                self._tabs.popitem(last=False)[1].close()
        self._tabs.move_to_end(session)
        return tab

    def close(self, session: str) -> None:
        """A tab was closed or loaded anew."""
        if tab := self._tabs.pop(session, None):
            tab.close()

    def __len__(self) -> int:
        return len(self._tabs)


def slug(text: str) -> str:
    """A short piece of a file name: letters and digits of any language, the rest as dashes."""
    return re.sub(r"[\W_]+", "-", text).strip("-").lower()[:40] or "picture"
