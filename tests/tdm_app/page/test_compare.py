"""Two checkpoints on one seed, in the browser."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image


def start(page: Any, seed: str) -> None:
    page.get_by_role("tab", name="Compare", exact=True).click()
    page.locator("#compare-prompt :is(textarea, input)").fill('the word "CAT" in red')
    page.locator("#compare-seed input").fill(seed)


def picture(page: Any, number: int) -> Image.Image:
    from io import BytesIO

    image = page.locator(f"#compare-{number} .done .pixels img")
    image.wait_for()
    return Image.open(BytesIO(page.request.get(image.evaluate("image => image.src")).body()))


def test_two_checkpoints_on_one_seed(page: Any) -> None:
    start(page, "5")
    page.locator("#compare").click()
    sides = [picture(page, number) for number in (0, 1)]
    recipes = [json.loads(side.info["tdm-serve"]) for side in sides]
    assert [recipe["model"] for recipe in recipes] == ["default-tdm", "default"]
    assert {recipe["seed"] for recipe in recipes} == {5}
    assert sides[0].tobytes() != sides[1].tobytes()
    assert page.locator("#compare-shots .title strong").all_inner_texts() == ["default-tdm", "default"]
    assert page.evaluate("[...window.previews].length") == 6


def test_the_teacher_too_and_a_verdict(page: Any, site: Any, export: Any) -> None:
    start(page, "6")
    page.locator("#compare-left input").click()
    page.get_by_role("option", name="default-teacher").click()
    page.locator("#compare").click()
    page.locator("#better-right").wait_for()
    assert "50 NFE" in page.locator("#compare-0").inner_text()
    page.locator("#better-right").click()
    page.locator("#better-right.primary").wait_for()
    mine = {record["model"]: record["like"] for record in export() if record["seed"] == 6}
    assert mine == {"default-teacher": False, "default": True}
    page.locator("#better-left").click()  # people change their minds
    page.locator("#better-left.primary").wait_for()
    mine = {record["model"]: record["like"] for record in export() if record["seed"] == 6}
    assert mine == {"default-teacher": True, "default": False}
    assert page.locator("#better-right.primary").count() == 0


def test_an_error_hides_the_verdict(page: Any) -> None:
    start(page, "x")
    page.locator("#compare").click()
    page.locator("#compare-problem").wait_for()
    assert "whole number" in page.locator("#compare-problem").inner_text()
    assert not page.locator("#verdict").is_visible()
