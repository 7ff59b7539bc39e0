"""The page, in the system's Chromium: a prompt is typed, a picture appears, nothing else is contacted."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

# Most of these keep the browser itself quiet, so that every request seen is one of the page's.
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    """The open page. Console errors and requests to other hosts fail the test."""
    complaints: list[str] = []
    context = browser.new_context(accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE_MS)
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: _note_foreign(request.url, server.url, complaints))
    tab.on("requestfailed", lambda request: _note_failure(request, complaints))
    tab.goto(f"{server.url}/")
    tab.locator("#prompt textarea").wait_for()
    yield tab
    found = list(complaints)  # leaving the page cuts its streams, which is no complaint
    context.close()
    assert found == []


def _note_foreign(url: str, own: str, complaints: list[str]) -> None:
    if not url.startswith((own, "data:", "blob:")):
        complaints.append(f"foreign: {url}")


def _note_failure(request: Any, complaints: list[str]) -> None:
    if request.failure != "net::ERR_ABORTED":  # that one is the page closing a stream that it has read to its end
        complaints.append(f"{request.failure}: {request.url}")


def test_a_prompt_becomes_a_picture(page: Any, server: Any) -> None:
    page.locator("#prompt textarea").fill("two red circles")
    page.locator("#generate-seed textarea, #generate-seed input").fill("7")
    page.locator("#generate").click()
    shown = page.locator("#generate-shots .done .pixels img").first
    shown.wait_for()
    assert "seed 7 · 4 NFE" in page.locator("#generate-shots").inner_text()
    facts = page.locator("#facts td").all_inner_texts()
    assert facts[:3] == ["1", "7", "4"]
    assert float(facts[-1]) > 0
    _check_same_as_api(page, server, shown.get_attribute("src"))


def _check_same_as_api(page: Any, server: Any, source: str) -> None:
    """The shown file has the API's pixels and the recipe."""
    body = {"prompt": "two red circles", "seed": 7}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
    wanted = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    got = Image.open(io.BytesIO(page.request.get(f"{server.url}/{source}").body()))
    assert got.tobytes() == wanted.tobytes()
    assert json.loads(got.info["tdm-serve"]) == json.loads(wanted.info["tdm-serve"])


def test_several_pictures_of_another_size(page: Any) -> None:
    page.locator("#prompt textarea").fill("a blue ring left of a star")
    page.locator("#generate-seed textarea, #generate-seed input").fill("20")
    page.locator("#size input").fill("160x96")
    page.locator("#size input").press("Tab")
    page.locator("#count label", has_text="3").click()
    page.locator("#generate").click()
    page.locator("#facts tbody tr").nth(2).wait_for()
    seeds = [row.locator("td").nth(1).inner_text() for row in page.locator("#facts tbody tr").all()]
    assert seeds == ["20", "21", "22"]
    assert page.locator("#generate-shots img").count() >= 3
    width, height = page.locator("#generate-shots .done .pixels img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert (width, height) == (160, 96)


@pytest.mark.parametrize(
    ("prompt", "seed", "said"),
    [("", "", "the prompt is empty"), ("a red circle", "seven", "whole number"), ("red " * 300, "", "token")],
)
def test_errors_are_sentences(page: Any, prompt: str, seed: str, said: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#generate-seed textarea, #generate-seed input").fill(seed)
    page.locator("#generate").click()
    problem = page.locator("#generate-problem")
    problem.wait_for()
    assert said in problem.inner_text()
    page.locator("#prompt textarea").fill("a red circle")
    page.locator("#generate-seed textarea, #generate-seed input").fill("")
    page.locator("#generate").click()
    page.locator("#facts td").first.wait_for()
    problem.wait_for(state="hidden")


def test_an_example_fills_the_box_and_enter_generates(page: Any) -> None:
    page.get_by_text("four green triangles").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'four green triangles'")
    page.locator("#prompt textarea").press("Enter")
    page.locator("#generate-shots .done .pixels img").first.wait_for()


def test_two_tabs_work_side_by_side(page: Any, server: Any) -> None:
    other = page.context.new_page()
    other.goto(f"{server.url}/")
    for tab, seed in ((page, "1"), (other, "2")):
        tab.locator("#prompt textarea").fill("a red circle")
        tab.locator("#generate-seed textarea, #generate-seed input").fill(seed)
        tab.locator("#generate").click()
    for tab, seed in ((page, "1"), (other, "2")):
        tab.locator("#facts td").first.wait_for()
        assert tab.locator("#facts td").nth(1).inner_text() == seed
    other.close()
