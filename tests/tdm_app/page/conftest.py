"""A server with all embedded checkpoints and feedback switched on, and the system's Chromium in front of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

# Most of these keep the browser itself quiet, so that every request seen is one of the page's.
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
MODELS = "default,default-tdm,default-teacher"
PATIENCE_MS = 60_000
# Notes in the page what flits by too quickly for a test to look at: previews, and what the status line said.
WATCH = """
window.previews = new Set(); window.said = [];
new MutationObserver(() => {
  for (const image of document.querySelectorAll(".live img")) window.previews.add(image.src);
  const status = [...document.querySelectorAll(".status .said")].find((one) => one.offsetParent);
  if (status && status.innerText !== window.said.at(-1)) window.said.push(status.innerText);
}).observe(document, { childList: true, subtree: true });
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A running server."""

    url: str
    state: Path

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))

    def settle(self) -> None:
        """Waits until nothing waits and nothing runs."""
        deadline = time.monotonic() + 30
        while self.metric("tdm_serve:num_pictures_waiting") + self.metric("tdm_serve:num_pictures_running"):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@contextmanager
def running(folder: Path, environment: dict[str, str], *options: str) -> Iterator[Site]:
    """A server as a user starts it, on a free port. It must end well, and have written no traceback."""
    command = [sys.executable, "-m", "tdm_serve.cli", "serve", "--device", "cpu", "--port", "0"]
    command += ["--state-dir", str(folder / "state"), *options]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            found = re.search(r"page (\S+)/,", process.stdout.readline())
            assert found, (folder / "log").read_text()
            _wait_ready(found[1])
            yield Site(found[1], folder / "state")
        finally:
            process.terminate()
            process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Site]:
    with running(tmp_path_factory.mktemp("site"), environment, "--model", MODELS, "--feedback") as site:
        yield site


@pytest.fixture
def start_site(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Site]]:
    """`start_site(*options)` starts another server for one test."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(running(tmp_path, environment, *options))


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while httpx.get(f"{url}/readyz", timeout=10).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def export(site: Site, cli: Callable[..., Any], tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """`export()` is what `tdm-serve feedback export` writes of the running server's state."""

    def records() -> list[dict[str, Any]]:
        done = cli("feedback", "export", "-", "--state-dir", str(site.state), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return records


@pytest.fixture(scope="module")  # while it is open, its event loop is in the way of tests that run one
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, site: Site) -> Iterator[Callable[..., Any]]:
    """`open_page(**options of the window)`. Console errors and requests to other hosts fail the test."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def opened(**options: Any) -> Any:
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: _note_foreign(request.url, site.url, complaints))
        page.on("requestfailed", lambda request: _note_failure(request, complaints))
        page.goto(f"{site.url}/")
        page.locator("#prompt :is(textarea, input)").wait_for()
        return page

    yield opened
    found = list(complaints)  # leaving the page cuts its streams, which is no complaint
    for context in contexts:
        context.close()
    assert found == []


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """The open page in a wide window."""
    return open_page()


def _note_foreign(url: str, own: str, complaints: list[str]) -> None:
    if not url.startswith((own, "data:", "blob:")):
        complaints.append(f"foreign: {url}")


def _note_failure(request: Any, complaints: list[str]) -> None:
    if request.failure != "net::ERR_ABORTED":  # that one is the page closing a stream that it has read to its end
        complaints.append(f"{request.failure}: {request.url}")
