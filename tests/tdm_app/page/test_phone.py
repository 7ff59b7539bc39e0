"""The page in a window of a phone's width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WIDTH = 390


def overflow(page: Any) -> int:
    """Pixels by which the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


def test_a_phone_shows_everything_without_scrolling_sideways(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": WIDTH, "height": 844}, has_touch=True, is_mobile=True)
    assert overflow(page) == 0
    page.locator("#prompt :is(textarea, input)").fill("a blue ring left of a star " + "and a red circle " * 3)
    page.locator("#count label", has_text="4").tap()
    page.locator("#generate").tap()
    page.locator("#generate-3 .done img").first.wait_for()
    assert overflow(page) == 0
    for tab, prompt, go, last in (
        ("Compare", "#compare-prompt", "#compare", "#compare-1"), ("Rate", "#rate-prompt", "#rate", "#rate-3"),
    ):  # fmt: skip
        page.get_by_role("tab", name=tab, exact=True).tap()
        page.locator(f"{prompt} :is(textarea, input)").fill("two red circles")
        page.locator(go).tap()
        page.locator(f"{last} .done img").first.wait_for()
        assert overflow(page) == 0, tab
        assert page.locator(f"{last}-up").bounding_box()["height"] >= 40  # a finger's
    page.get_by_role("tab", name="History", exact=True).tap()
    page.locator("#history button").first.tap()
    page.locator("#history-recipe td").first.wait_for()
    assert overflow(page) == 0


def test_long_errors_wrap(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": WIDTH, "height": 844})
    page.locator("#generate-seed input").fill("x" * 300)
    page.locator("#prompt :is(textarea, input)").press("Enter")
    page.locator("#generate-problem").wait_for()
    assert overflow(page) == 0
