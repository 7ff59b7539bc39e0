"""What was made in a tab, in the browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_history_of_a_tab(page: Any, tmp_path: Path) -> None:
    history = page.get_by_role("tab", name="History", exact=True)
    history.click()
    page.get_by_text("Nothing yet.").wait_for()
    page.get_by_role("tab", name="Generate", exact=True).click()
    for number, prompt in enumerate(("two red circles", "a yellow star"), 1):
        page.locator("#prompt :is(textarea, input)").fill(prompt)
        page.locator("#generate-seed input").fill(str(number))
        page.locator("#generate").click()
        page.locator(f"#generate-0 .done .pixels img[alt='{prompt}, seed {number}']").wait_for()
    history.click()
    page.locator("#history button").nth(1).wait_for()
    assert page.locator("#history button").count() == 2
    page.locator("#history button").nth(1).click()
    page.locator("#history-recipe td", has_text="two red circles").wait_for()
    with page.expect_download() as download:
        page.locator("#history-detail .files a", has_text="Recipe").click()
    download.value.save_as(tmp_path / "recipe.json")
    assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == 1
    with page.expect_download() as download:
        page.locator("#history-detail .files a", has_text="PNG").click()
    assert download.value.suggested_filename == "two-red-circles-1-default.png"
    page.locator("#history-use").click()
    page.locator("#generate").wait_for()
    assert page.locator("#prompt :is(textarea, input)").input_value() == "two red circles"
    assert page.locator("#generate-seed input").input_value() == "1"
    assert page.locator("#generate-lock input").is_checked()
    page.reload()
    page.locator("#prompt :is(textarea, input)").wait_for()
    history.click()
    page.get_by_text("Nothing yet.").wait_for()
