"""Libraries' progress bars ("Loading weights") are for somebody who watches: none where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_bars() -> Generator[None]:
    """For the duration of a block, unless stderr is a terminal; afterwards every switch is as it was."""
    if sys.stderr.isatty():
        yield
        return
    hub_was_off = are_progress_bars_disabled()  # transformers' switches move this one, too
    were_on = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in were_on:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in were_on:
            module.enable_progress_bar()
        if hub_was_off:
            disable_progress_bars()
