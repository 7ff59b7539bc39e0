"""Previews are made beside the device thread, never in it.

One thread, so that a ticket's events keep their order; its outcome goes the same way, after the last preview. When more
previews are asked for than it can make, events go out without one: a preview is worth nothing late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from tdm_serve.core import Progress
from tdm_serve.ticket import Mailbox, Outcome, post

logger = logging.getLogger(__name__)

MOST_PENDING = 32


class PreviewThread:
    """`draw` makes a picture of clean latents; `lost` hears of mailboxes whose event loop is closed."""

    def __init__(self, draw: Callable[[Any], Image.Image], lost: Callable[[Mailbox], object]) -> None:
        self._draw = draw
        self._lost = lost
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tdm-serve preview")
        self._pending = 0
        self._lock = threading.Lock()

    def tell(self, mailbox: Mailbox, progress: Progress, clean: Any) -> None:
        """Posts the event with a preview of `clean`; without one for the last step, and when there are too many."""
        if progress.step == progress.total or self._pending >= MOST_PENDING:
            self._submit(self._post, mailbox, progress)
            return
        with self._lock:
            self._pending += 1
        self._submit(self._make, mailbox, progress, clean)

    def settle(self, mailbox: Mailbox, outcome: Outcome) -> None:
        """Posts the outcome after everything that was told before."""
        self._submit(self._post, mailbox, outcome)

    def close(self) -> None:
        """Waits for what is pending, then ends the thread."""
        self._thread.shutdown()

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Python takes no new work when it is about to end; nobody can wait for previews then."""
        with contextlib.suppress(RuntimeError):
            self._thread.submit(task, *arguments)

    def _make(self, mailbox: Mailbox, progress: Progress, clean: Any) -> None:
        with self._lock:
            self._pending -= 1
        if mailbox.outcome is not None:
            return
        try:
            progress = dataclasses.replace(progress, preview=self._draw(clean))
        except Exception:
            logger.exception("a preview could not be made")
        self._post(mailbox, progress)

    def _post(self, mailbox: Mailbox, content: Progress | Outcome) -> None:
        for lost in post([(mailbox, content)]):
            self._lost(lost)
