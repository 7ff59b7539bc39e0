"""Libraries' progress bars: silent where nobody watches, and as before afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from tdm_serve.models.quiet import quiet_bars

State = tuple[bool, bool, bool]


def state() -> State:
    """Whether each of the three switches is on."""
    libraries = (diffusers_logging, transformers_logging)
    diffusers, transformers = (library.is_progress_bar_enabled() for library in libraries)
    return diffusers, transformers, not are_progress_bars_disabled()


def set_state(wanted: State) -> None:
    for library, on in zip((diffusers_logging, transformers_logging), wanted, strict=False):
        (library.enable_progress_bar if on else library.disable_progress_bar)()
    (enable_progress_bars if wanted[2] else disable_progress_bars)()


@pytest.mark.parametrize(
    "before", [(True, True, True), (False, True, True), (True, True, False), (True, False, False), (False, False, True)]
)
def test_every_switch_is_put_back(before: State) -> None:
    found = state()
    try:
        set_state(before)
        assert state() == before
        with quiet_bars():
            assert state()[:2] == (False, False)
        assert state() == before
        with pytest.raises(RuntimeError), quiet_bars():
            raise RuntimeError
        assert state() == before
    finally:
        set_state(found)


def test_a_terminal_keeps_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    before = state()
    with quiet_bars():
        assert state() == before


def test_loading_prints_nothing(environment: dict[str, str]) -> None:
    """In a fresh process, whose switches are on, as in anybody's script."""
    code = (
        "from tdm_serve import Pipeline\n"
        "Pipeline.from_pretrained('default')\n"
        "from transformers.utils import logging\n"
        "print(logging.is_progress_bar_enabled())"
    )
    variables = {key: value for key, value in environment.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
