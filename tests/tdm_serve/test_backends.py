"""Choosing a backend: explicit choices run or say why not; the compiled one makes the same pictures."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from torch import nn

from tdm_serve import Pipeline
from tdm_serve.backends import create
from tdm_serve.core import Request
from tdm_serve.engine import Engine
from tdm_serve.errors import BackendUnavailable, ConfigError


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="'steam' is unknown; choose auto, compiled, eager"):
        create("steam", nn.Linear(1, 1))


def test_auto_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(1, 1)
    with caplog.at_level(logging.INFO, "tdm_serve"):  # whose level a server of another test may have set
        assert create("auto", module) is module
    assert "eager" in caplog.text


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendUnavailable, match=r"needs a C\+\+ compiler"):
        create("compiled", nn.Linear(1, 1))


@pytest.mark.slow
def test_compiled_pictures_are_those_of_eager(pipeline: Pipeline) -> None:
    """And without a warning, which would be an error here: nothing reaches the compiler that it cannot do."""
    compiled = Pipeline.from_pretrained("default", backend="compiled")
    ours, theirs = (np.asarray(p("two red circles", seed=1)[0].image).astype(int) for p in (compiled, pipeline))
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_compiled_pictures_have_their_adapters_strength() -> None:
    """The usual one, of which each version is compiled, and others, which are not."""
    models = ["default", "default-tdm"]
    compiled, eager = (Engine.load(models, backend=name, adapters="separate") for name in ("compiled", "eager"))
    asked = [Request("a star", 1, 64, 64, model=model, adapter_scale=s) for model in models for s in (None, 0.5, 0.0)]
    for ours, theirs in zip(*(engine.generate(asked) for engine in (compiled, eager)), strict=True):
        assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs.image)).max() <= 1
