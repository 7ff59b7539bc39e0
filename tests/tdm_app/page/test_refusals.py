"""What the page says when the server takes no more, and what it leaves out where there is nothing to choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.slow
def test_a_plain_server_and_its_limits(browser: Any, start_site: Callable[..., Any]) -> None:
    site = start_site("--pictures-per-minute", "3", "--requests-per-minute", "4")
    page = browser.new_context().new_page()
    page.goto(f"{site.url}/")
    page.locator("#prompt :is(textarea, input)").fill("a red circle")
    for absent in ("#model", "#generate-0 .thumbs"):
        assert not page.locator(absent).first.is_visible()
    assert page.get_by_role("tab").all_inner_texts() == ["Generate", "History"]
    page.locator("#count label", has_text="3").click()
    page.locator("#generate").click()
    page.locator("#generate-2 .done").wait_for()
    page.locator("#generate").click()
    problem = page.locator("#generate-problem [role=alert]")
    problem.wait_for()
    assert "the limit is 3 pictures a minute; the next fits in" in problem.inner_text()
    for _ in range(4):
        page.locator("#generate").click()
        page.wait_for_timeout(300)
    note = page.locator("#refused")
    note.wait_for()
    assert "the limit is 4 requests a minute; the next fits in" in note.inner_text()
    assert page.locator("#generate").is_enabled()
    page.context.close()
