"""The page in the system's Chromium, for its test and its benchmark: a picture by its button, and its figures."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from make_site import server
from numpy.typing import NDArray

PATIENCE_MS = 120_000
PIXELS = """() => {
  const { width, height } = document.querySelector("canvas");
  const { data } = document.querySelector("canvas").getContext("2d").getImageData(0, 0, width, height);
  return [width, height, btoa(String.fromCharCode.apply(null, data))];
}"""


class Page:
    """An open page."""

    def __init__(self, browser: Any, url: str) -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, url))
        self.page.goto(url)

    def _note(self, url: str, own: str) -> None:
        if not url.startswith((own.partition("?")[0], "data:", "blob:")):
            self.complaints.append(f"foreign: {url}")

    def ready(self) -> None:
        self.page.locator("#generate:enabled").wait_for()

    def ask(self, prompt: str, seed: int | str) -> str:
        """Presses the button; what the status line says in the end."""
        self.page.locator("#prompt").fill(prompt)
        self.page.locator("#seed").fill(str(seed))
        self.page.locator("#status").evaluate("status => (status.textContent = '')")
        self.page.locator("#generate").click()
        self.page.locator("#status.failed, #status:text-is('done')").wait_for()
        return self.page.locator("#status").inner_text()

    def picture(self, prompt: str, seed: int) -> NDArray[np.uint8]:
        """What the canvas shows (H, W, 3)."""
        assert (said := self.ask(prompt, seed)) == "done", said
        width, height, data = self.page.evaluate(PIXELS)
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]

    def figure(self, name: str) -> list[float]:
        """The numbers behind one of the page's figures: bytes or seconds."""
        return [float(value) for value in self.page.locator(f"#{name}[value]").get_attribute("value").split()]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a built folder, until the block ends."""
    with server(folder) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/"
        finally:
            running.shutdown()
            thread.join()


def peak_mb(browser: Any) -> float:
    """The most memory that any of the browser's page processes has ever had resident (Linux)."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    statuses = [Path(f"/proc/{one['id']}/status").read_text() for one in processes if one["type"] == "renderer"]
    return max(int(re.findall(r"VmHWM:\s*(\d+) kB", text)[0]) for text in statuses) * 1024 / 1e6
