"""Draws docs/page*.png: the web page in the system's Chromium, with a real server behind it.

Needs the extras `demo` and `test`. The seeds are fixed, so that the pictures in it stay the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WIDE, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}
START_S, MAX_BYTES = 180, 300_000


def main() -> None:
    from playwright.sync_api import sync_playwright

    with serving() as url, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        generate(opened(browser, url, viewport=WIDE), "page")
        compare(opened(browser, url, viewport=WIDE))
        rate(opened(browser, url, viewport=WIDE))
        generate(opened(browser, url, viewport=PHONE, device_scale_factor=1.5, color_scheme="dark"), "page-phone")
        browser.close()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A server of its own on a free port; its address."""
    folders = os.pathsep.join(str(ROOT / name) for name in ("", "app", "exporters", "finetune", "kernels"))
    models = "default,default-tdm,default-teacher"
    command = [sys.executable, "-m", "tdm_serve.cli", "serve", "--port", "0", "--model", models, "--feedback"]
    command.append("--online-training")
    with tempfile.TemporaryDirectory() as state:
        process = subprocess.Popen(
            [*command, "--state-dir", state],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": folders},
        )
        try:
            assert process.stdout is not None
            found = re.search(r"page (\S+)/,", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            wait_ready(found[1])
            yield found[1]
        finally:
            process.terminate()
            process.communicate()


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/readyz") as answer:  # noqa: S310 - our own
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_S} s")


def opened(browser: Any, url: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.locator("#prompt :is(textarea, input)").wait_for()
    return page


def rate(page: Any) -> None:
    """A group that is rated, and the training that learns from it; it is called off afterwards."""
    page.get_by_role("tab", name="Rate", exact=True).click()
    page.locator("#rate-prompt :is(textarea, input)").fill("a blue ring left of a yellow star")
    page.locator("#rate").click()
    page.locator("#rate-3-up").wait_for()
    for place, thumb, look in ((0, "up", "primary"), (1, "down", "stop"), (2, "down", "stop")):
        page.locator(f"#rate-{place}-{thumb}").click()
        page.locator(f"#rate-{place}-{thumb}.{look}").wait_for()
    page.locator("#train").click()
    page.locator("#train-status", has_text=" of 60 updates").wait_for(timeout=120_000)
    save(page, "page-rate")
    page.locator("#train-cancel").click()
    page.locator("#train-status", has_text="was cancelled").wait_for()


def generate(page: Any, name: str) -> None:
    """Two pictures, one of them liked."""
    page.locator("#prompt :is(textarea, input)").fill("a blue ring left of a yellow star")
    page.locator("#generate-seed input").press_sequentially("8")
    page.locator("#count label", has_text="2").click()
    page.locator("#generate").click()
    page.locator("#generate-1-up").wait_for()
    page.locator("#generate-1-up").click()
    page.locator("#generate-1-up.primary").wait_for()
    save(page, name)


def compare(page: Any) -> None:
    """TDM beside TDM-R1 on one seed."""
    page.get_by_role("tab", name="Compare", exact=True).click()
    page.locator("#compare-prompt :is(textarea, input)").fill("three yellow triangles")
    page.locator("#compare-seed input").press_sequentially("6")
    page.locator("#compare").click()
    page.locator("#better-right").click()
    page.locator("#better-right.primary").wait_for()
    save(page, "page-compare")


def save(page: Any, name: str) -> None:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(2000)  # until what moves has come to rest
    target = DOCS / f"{name}.png"
    page.screenshot(path=target)
    size = target.stat().st_size
    print(f"{target}: {size // 1000} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{target} has {size} bytes; allowed in the repository: {MAX_BYTES}")


if __name__ == "__main__":
    main()
