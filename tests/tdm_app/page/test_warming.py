"""The page of a server that warms up slowly: it says so, Cancel works, and patience is rewarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servers import serving

from tdm_app.api import create_app
from tdm_app.settings import Settings
from tdm_serve import AsyncEngine
from tests.tdm_serve.toy_device import SlowStart


@pytest.mark.slow
def test_early_visitors_wait_or_leave(browser: Any, tmp_path: Path) -> None:
    device = SlowStart()
    app = create_app(AsyncEngine(device, profile=tmp_path), Settings.model_validate({}))
    with serving(app) as url:
        try:
            page = browser.new_context().new_page()
            page.set_default_timeout(30_000)
            page.goto(f"{url}/")
            page.locator("#prompt :is(textarea, input)").fill("a star")
            page.locator("#generate").click()
            page.locator("#generate-status", has_text="The model is warming up").wait_for()
            page.locator("#cancel").click()
            page.locator("#generate-status", has_text="Cancelled.").wait_for()
            page.locator("#generate").click()
            page.locator("#generate-status", has_text="The model is warming up").wait_for()
            device.warm.set()
            page.locator("#generate-0 .done").wait_for()
            assert app.state.service.engine.stats().accepted == 1
        finally:
            device.warm.set()
