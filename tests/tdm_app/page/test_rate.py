"""Thumbs and the online mode, in the browser: clicks become records that the trainer takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tdm_finetune.rewards.feedback import groups, read_feedback


def show_group(page: Any, prompt: str) -> None:
    page.get_by_role("tab", name="Rate", exact=True).click()
    page.locator("#rate-prompt :is(textarea, input)").fill(prompt)
    page.locator("#rate").click()
    page.locator("#rate-3-up").wait_for()


def test_thumbs_are_recorded(page: Any, export: Any) -> None:
    page.locator("#prompt :is(textarea, input)").fill("a thumb of a star")
    page.locator("#generate-seed input").fill("77")
    page.locator("#generate").click()
    for thumb, look, like in (("up", "primary", True), ("down", "stop", False)):
        page.locator(f"#generate-0-{thumb}").click()
        page.locator(f"#generate-0-{thumb}.{look}").wait_for()
        mine = [record for record in export() if record["prompt"] == "a thumb of a star"]
        assert [(record["seed"], record["like"]) for record in mine] == [(77, like)]  # the last word counts
    assert page.locator("#generate-0-up.primary").count() == 0


def test_a_rated_group_is_one_the_trainer_uses(page: Any, export: Any, tmp_path: Path) -> None:
    prompt = "two cyan rings to rate"
    show_group(page, prompt)
    before = int(page.locator("#score strong").inner_text())
    page.locator("#rate-0-up").click()
    page.locator("#rate-0-up.primary").wait_for()
    page.locator("#rate-rest").click()
    page.wait_for_function("before => +document.querySelector('#score strong').innerText === before + 1", arg=before)
    file = tmp_path / "likes.jsonl"
    mine = [record for record in export() if record["prompt"] == prompt]
    file.write_text("".join(json.dumps(record) + "\n" for record in mine))
    (group,) = groups(read_feedback(file), 2)
    assert group.ratings.count(1.0) == 1
    assert group.ratings.count(-1.0) == 3
    assert "tdm-serve feedback export likes.jsonl" in page.locator("#score").inner_text()
    assert "--checkpoint default --feedback likes.jsonl" in page.locator("#score").inner_text()
    page.locator("#rate-3-up").wait_for()  # the next group, of another prompt
    assert page.locator("#rate-prompt :is(textarea, input)").input_value() != prompt


def test_keys_rate(page: Any, export: Any) -> None:
    prompt = "three orange stars by keys"
    show_group(page, prompt)
    page.locator("#rate-status").click()  # out of the text box
    page.keyboard.press("1")
    page.locator("#rate-0-up.primary").wait_for()
    page.keyboard.press("Shift+2")
    page.locator("#rate-1-down.stop").wait_for()
    usable = "() => /^[1-9]/.test(document.querySelector('#score strong').innerText)"
    page.wait_for_function(usable)
    mine = sorted((record["seed"], record["like"]) for record in export() if record["prompt"] == prompt)
    assert [like for _, like in mine] == [True, False]
    page.locator("#rate-prompt :is(textarea, input)").press("3")  # there it is a character
    assert page.locator("#rate-2-up.primary").count() == 0


def test_another_prompt(page: Any) -> None:
    page.get_by_role("tab", name="Rate", exact=True).click()
    page.locator("#rate-another").click()
    page.wait_for_function("() => document.querySelector('#rate-prompt :is(textarea, input)').value !== ''")


@pytest.mark.slow
def test_the_commands_on_the_page_work(page: Any, site: Any, cli: Any, tmp_path: Path) -> None:
    show_group(page, "a red circle and a blue star")
    page.locator("#rate-0-up").click()
    page.locator("#rate-0-up.primary").wait_for()
    page.locator("#rate-1-down").click()
    page.locator("#rate-1-down.stop").wait_for()
    for line in page.locator("#score code").last.inner_text().splitlines():
        tail = (
            ["--state-dir", str(site.state)]
            if " feedback " in line
            else ["--groups", "2", "--group", "2", "--steps", "1", "--dry-run"]
        )
        done = cli(*line.split()[1:], *tail, cwd=tmp_path, timeout_s=280)
        assert done.returncode == 0, done.stderr
