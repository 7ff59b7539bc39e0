"""The first tab, in the system's Chromium: a prompt is typed, a picture appears, nothing else is contacted."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image


def ask(page: Any, prompt: str, seed: str = "") -> None:
    page.locator("#prompt :is(textarea, input)").fill(prompt)
    page.locator("#generate-seed input").fill(seed)


def choose(page: Any, box: str, option: str) -> None:
    page.locator(f"{box} input").click()
    page.get_by_role("option", name=option).click()


def resize(page: Any, size: str) -> None:
    page.locator("#size input").fill(size)
    page.locator("#size input").press("Tab")


def make_long(page: Any) -> None:
    """Settings under which the pictures take seconds."""
    choose(page, "#model", "default-teacher")
    resize(page, "256x256")
    page.locator("#count label", has_text="4").click()


def source(page: Any, slot: str = "#generate-0") -> str:
    """Address of the finished picture in a slot."""
    image = page.locator(f"{slot} .done .pixels img")
    image.wait_for()
    return str(image.evaluate("image => image.src"))


def next_source(page: Any, before: str) -> str:
    """Address of the picture that takes the place of another one."""
    now = "document.querySelector('#generate-0 .done .pixels img')?.src"
    page.wait_for_function(f"before => ![before, undefined].includes({now})", arg=before)
    return source(page)


def fetch(page: Any, address: str) -> Image.Image:
    return Image.open(io.BytesIO(page.request.get(address).body()))


def test_a_prompt_becomes_a_picture(page: Any, site: Any) -> None:
    ask(page, "two red circles", "7")
    page.locator("#generate").click()
    shown = source(page)
    assert "seed 7 · 4 NFE" in page.locator("#generate-shots").inner_text()
    page.locator("#facts td").first.wait_for()
    facts = page.locator("#facts td").all_inner_texts()
    assert facts[:3] == ["1", "7", "4"]
    assert float(facts[-1]) > 0
    body = {"prompt": "two red circles", "seed": 7}
    answer = httpx.post(f"{site.url}/v1/images/generations", json=body, timeout=60).json()
    wanted = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    got = fetch(page, shown)
    assert got.tobytes() == wanted.tobytes()
    assert json.loads(got.info["tdm-serve"]) == json.loads(wanted.info["tdm-serve"])


def test_previews_come_before_the_picture(page: Any) -> None:
    ask(page, "a blue ring left of a star", "3")
    page.locator("#generate").click()
    source(page)
    assert page.evaluate("[...window.previews].length") == 3  # the fourth evaluation is the picture itself
    assert page.locator("#generate-0 .strip img").count() == 4
    said = page.evaluate("window.said")
    for step in (1, 2, 3):
        assert any(line.startswith(f"{step} of 4 evaluations · ") for line in said), said
    assert said[-1].startswith("1 picture in ")


def test_several_pictures_of_another_size(page: Any) -> None:
    ask(page, "a blue ring left of a star", "20")
    resize(page, "160x96")
    page.locator("#count label", has_text="3").click()
    page.locator("#generate").click()
    page.locator("#facts tbody tr").nth(2).wait_for()
    seeds = [row.locator("td").nth(1).inner_text() for row in page.locator("#facts tbody tr").all()]
    assert seeds == ["20", "21", "22"]
    assert page.locator("#generate-shots .done").count() == 3
    assert fetch(page, source(page)).size == (160, 96)


def test_size_presets(page: Any) -> None:
    choose(page, "#size", "Landscape")
    ask(page, "a red circle")
    page.locator("#generate").click()
    width, height = fetch(page, source(page)).size
    assert width > height


@pytest.mark.parametrize(
    ("prompt", "seed", "size", "said"),
    [("", "", "", "the prompt is empty"), ("a red circle", "seven", "", "whole number"),
     ("red " * 300, "", "", "token"),
     ("a red circle", "", "100x100", "multiple of 16"), ("a red circle", "", "big", "WIDTHxHEIGHT"),
     ("<img src=x> circle", "-1", "", "between 0 and")],
)  # fmt: skip
def test_errors_are_sentences(page: Any, prompt: str, seed: str, size: str, said: str) -> None:
    ask(page, prompt, seed)
    if size:
        resize(page, size)
    page.locator("#generate").click()
    problem = page.locator("#generate-problem")
    problem.wait_for()
    assert said in problem.inner_text()
    assert problem.locator("[role=alert]").count() == 1
    ask(page, "a red circle")
    resize(page, "128x128")
    page.locator("#generate").click()
    source(page)
    problem.wait_for(state="hidden")


def test_what_people_type_is_shown_as_text(page: Any) -> None:
    ask(page, 'x" onerror="1 <b>*y*</b>', "<i>7</i>")
    page.locator("#generate").click()
    page.locator("#generate-problem").wait_for()
    assert "<i>7</i>" in page.locator("#generate-problem").inner_text()
    ask(page, '<b>*a*</b> " onload="x')
    page.locator("#generate").click()
    source(page)
    alt = page.locator("#generate-0 .done .pixels img").get_attribute("alt")
    assert alt.startswith('<b>*a*</b> " onload="x, seed ')


def test_an_example_fills_the_box_and_enter_generates(page: Any) -> None:
    page.get_by_text("four green triangles").click()
    page.wait_for_function(
        "() => document.querySelector('#prompt :is(textarea, input)').value === 'four green triangles'"
    )
    page.locator("#prompt :is(textarea, input)").press("Enter")
    source(page)


@pytest.mark.parametrize("key", [False, True])
def test_cancel_ends_it_within_an_evaluation(page: Any, site: Any, key: bool) -> None:
    make_long(page)
    ask(page, "two red circles")
    page.locator("#generate").click()
    page.locator("#generate-shots .live img").first.wait_for()
    if key:
        page.keyboard.press("Escape")
    else:
        page.locator("#cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    site.settle()
    assert page.locator("#generate-shots .done").count() == 0
    assert page.locator("#cancel").is_disabled()
    choose(page, "#model", "default · 4")
    page.locator("#generate").click()
    source(page)


def test_a_closed_tab_calls_its_pictures_off(open_page: Callable[..., Any], site: Any) -> None:
    page = open_page()
    make_long(page)
    ask(page, "two red circles")
    before = site.metric("tdm_serve:requests_cancelled_total")
    page.locator("#generate").click()
    page.locator("#generate-shots .live img").first.wait_for()
    page.close()
    site.settle()
    assert site.metric("tdm_serve:requests_cancelled_total") == before + 1


def test_the_same_seed_makes_the_same_picture_again(page: Any) -> None:
    ask(page, "a yellow star")
    page.locator("#generate").click()
    first = source(page)
    page.locator("#generate").click()
    second = next_source(page, first)
    assert fetch(page, first).tobytes() != fetch(page, second).tobytes()  # an empty box is any seed
    page.locator("#generate-again").click()
    assert fetch(page, second).tobytes() == fetch(page, next_source(page, second)).tobytes()
    assert page.locator("#generate-lock input").is_checked()
    seed = page.locator("#generate-seed input").input_value()
    assert f"seed {seed} " in page.locator("#generate-0").inner_text()
    page.locator("#generate-lock input").uncheck()
    page.wait_for_function("() => document.querySelector('#generate-seed input').value === ''")


def test_a_locked_seed_stays(page: Any) -> None:
    page.locator("#generate-lock input").check()
    ask(page, "a yellow star")
    page.locator("#generate").click()
    source(page)
    page.wait_for_function("() => document.querySelector('#generate-seed input').value !== ''")
    assert f"seed {page.locator('#generate-seed input').input_value()} " in page.locator("#generate-0").inner_text()


def test_two_tabs_work_side_by_side(open_page: Callable[..., Any]) -> None:
    tabs = [(open_page(), "1"), (open_page(), "2")]
    for tab, seed in tabs:
        ask(tab, "a red circle", seed)
        tab.locator("#generate").click()
    for tab, seed in tabs:
        tab.locator("#facts td").first.wait_for()
        assert tab.locator("#facts td").nth(1).inner_text() == seed


def test_the_keyboard_is_enough(page: Any) -> None:
    page.wait_for_function("() => document.activeElement.matches('#prompt *')")  # one can type at once
    page.keyboard.type("a red circle")
    visited: list[str] = []
    for _ in range(16):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("(document.activeElement.closest('[id]:not(main)') || {}).id || ''"))
        if visited[-1] == "generate-lock":
            break
    wanted = ["generate", "model", "size", "count", "generate-seed", "generate-lock"]
    assert list(dict.fromkeys(name for name in visited if name in wanted)) == wanted
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    source(page)
    assert "seed 5 " in page.locator("#generate-0").inner_text()
    page.wait_for_function("() => document.querySelector('#generate-lock input').checked")  # as it was typed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_have_names(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    for role, name in (("textbox", "Prompt"), ("textbox", "Seed"), ("button", "Generate"), ("button", "Cancel"),
                       ("checkbox", "Lock seed"), ("radio", "2")):  # fmt: skip
        control = page.get_by_role(role, name=name, exact=True)
        control.first.wait_for()
        assert control.count() == 1, name
    assert page.locator("#generate-status").get_attribute("aria-live") == "polite"


def test_files_to_keep(page: Any, tmp_path: Path) -> None:
    ask(page, "two red circles", "11")
    page.locator("#generate").click()
    source(page)
    saved: dict[str, Path] = {}
    for link in ("PNG", "Recipe"):
        with page.expect_download() as download:
            page.locator("#generate-0 .files a", has_text=link).click()
        saved[link] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[link])
    assert [path.name for path in saved.values()] == [
        "two-red-circles-11-default.png",
        "two-red-circles-11-default.json",
    ]
    recipe = json.loads(saved["Recipe"].read_text())
    with Image.open(saved["PNG"]) as picture:
        assert recipe == json.loads(picture.info["tdm-serve"])
    assert (recipe["prompt"], recipe["seed"], recipe["model"]) == ("two red circles", 11, "default")
