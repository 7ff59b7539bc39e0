"""Ways to run a denoiser. One name, one creator, imported when chosen."""

from __future__ import annotations

import importlib
import logging

from torch import nn

from tdm_serve.backends.base import Denoise
from tdm_serve.errors import ConfigError

logger = logging.getLogger(__name__)

CREATORS = {"compiled": "tdm_serve.backends.compiled", "eager": "tdm_serve.backends.eager"}


def create(name: str, denoiser: nn.Module) -> Denoise:
    """The backend called `name`; only "auto" may choose, and it says what it took and why."""
    if name == "auto":
        logger.info("backend auto: eager, which needs no warm-up; ask for `compiled` to trade start-up for speed")
        name = "eager"
    if name not in CREATORS:
        raise ConfigError(f"backend {name!r} is unknown; choose auto, {', '.join(CREATORS)}")
    return importlib.import_module(CREATORS[name]).create(denoiser)
