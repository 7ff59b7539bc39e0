"""Clicks that train, in the browser: rate a group, train, load, choose the new version, compare it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAINED_MS = 300_000
TINY = """
groups = 1
group = 2
steps = 2
warmup = 1
decay_steps = 1
fake_warmup = 0
save_every = 1
score_every = 1000
score_prompts = 2
precision = "fp32"
"""


def chosen(page: Any, box: str, version: str) -> None:
    page.locator(f"#{box} input").click()
    page.get_by_role("option", name=version).click()


@pytest.mark.slow
def test_clicks_become_a_version(browser: Any, start_site: Callable[..., Any], tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    site = start_site("--feedback", "--online-training", "--online-config", str(config))
    page = browser.new_context().new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{site.url}/")
    page.get_by_role("tab", name="Rate", exact=True).click()
    page.locator("#train-status", has_text="Nothing was trained here yet").wait_for()
    assert not page.locator("#train-load").is_enabled()
    page.locator("#train").click()  # nothing is rated yet
    page.locator("#train-problem [role=alert]", has_text="there is nothing to learn").wait_for()

    page.locator("#rate-prompt :is(textarea, input)").fill("two red circles")
    page.locator("#rate").click()
    page.locator("#rate-3-up").wait_for()
    page.locator("#rate-0-up").click()
    page.locator("#rate-0-up.primary").wait_for()
    page.locator("#rate-1-down").click()
    page.locator("#rate-1-down.stop").wait_for()
    page.locator("#score", has_text="1 of 1 rated groups usable").wait_for()
    assert "tdm-serve feedback export" not in page.locator("#score").inner_text()  # nothing to type here

    page.locator("#train").click()
    page.locator("#train-status", has_text="Training default-online-1 from 2 ratings").wait_for()
    assert page.locator("#train-problem [role=alert]").count() == 0
    assert not page.locator("#train").is_enabled()
    page.locator("#train-status", has_text="load it to try it").wait_for(timeout=TRAINED_MS)
    page.locator("#train-load").click()
    page.locator("#train-status", has_text="default-online-1 is served").wait_for()

    page.get_by_role("tab", name="Generate", exact=True).click()
    chosen(page, "model", "default-online-1")
    page.locator("#prompt :is(textarea, input)").fill("two red circles")
    page.locator("#generate").click()
    page.locator("#generate-0 .done").wait_for()
    assert site.metric("tdm_serve:model_memory_bytes") > 0

    other = browser.new_context().new_page()  # a tab that is opened later knows it, too
    other.goto(f"{site.url}/")
    other.get_by_role("tab", name="Compare", exact=True).click()
    chosen(other, "compare-left", "default-online-1")
    other.locator("#compare-prompt :is(textarea, input)").fill("two red circles")
    other.locator("#compare").click()
    other.locator("#compare-1 .done").wait_for(timeout=60_000)
    assert "default-online-1" in other.locator("#compare-0").inner_text()


@pytest.mark.slow
def test_a_training_is_called_off(browser: Any, start_site: Callable[..., Any], tmp_path: Path) -> None:
    config = tmp_path / "long.toml"
    config.write_text(TINY.replace("steps = 2\n", "steps = 5000\n"))
    site = start_site("--feedback", "--online-training", "--online-config", str(config))
    page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()  # a phone's
    page.set_default_timeout(60_000)
    page.goto(f"{site.url}/")
    page.get_by_role("tab", name="Rate", exact=True).click()
    page.locator("#rate-prompt :is(textarea, input)").fill("a star")
    page.locator("#rate").click()
    page.locator("#rate-3-up").wait_for()
    page.locator("#rate-0-up").click()
    page.locator("#rate-0-up.primary").wait_for()
    page.locator("#rate-rest").click()
    page.locator("#score", has_text="1 of 1 rated groups usable").wait_for()
    page.locator("#train").click()
    page.locator("#train-status", has_text="of 5000 updates").wait_for(timeout=TRAINED_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#train-cancel").click()
    page.locator("#train-status", has_text="was cancelled").wait_for()
    assert page.locator("#train").is_enabled()
