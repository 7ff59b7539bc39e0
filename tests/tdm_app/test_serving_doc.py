"""docs/serving.md: its commands run, and its tables name what the service has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from sse_reader import parse

import tdm_app
from tdm_app.errors import HTTP_CODES, TABLE
from tdm_app.limits import Limits
from tdm_app.schemas import ImageRequest, ImagesResponse
from tdm_app.wording import CODES

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(text: str, marker: str, language: str) -> list[str]:
    return re.findall(rf"<!-- {marker} -->\n```{language}\n(.*?)```", text, re.DOTALL)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_curl_example(text: str, server: Any, tmp_path: Path, environment: dict[str, str]) -> None:
    done = shell(blocks(text, "test", "bash")[0], server, tmp_path, environment)
    with Image.open(tmp_path / "circles.png") as picture:
        assert picture.size == (128, 128)
    assert json.loads(done.stdout)["data"][0]["id"] == "default"


def test_job_example(text: str, server: Any, tmp_path: Path, environment: dict[str, str]) -> None:
    done = shell(blocks(text, "test", "bash")[1], server, tmp_path, environment)
    events, _ = parse((tmp_path / "events.txt").read_text())
    assert [event.name for event in events] == ["job.status", *["job.progress"] * 8, "job.succeeded"]
    job = json.loads(done.stdout)
    assert job["status"] == "succeeded"
    assert [httpx.get(data["url"]).status_code for data in job["result"]["data"]] == [200, 200]


def shell(block: str, server: Any, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = block.replace(ADDRESS, server.url).replace("python -c", f"{sys.executable} -c")
    return run(["bash", "-euo", "pipefail", "-c", script], folder, environment)


def test_client_example(text: str, server: Any, tmp_path: Path, environment: dict[str, str]) -> None:
    block = blocks(text, "test", "python")[0]
    done = run([sys.executable, "-c", block.replace(ADDRESS, server.url)], tmp_path, environment)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["7", "4"], ["8", "4"]]
    assert {path.name for path in tmp_path.iterdir()} == {"7.png", "8.png"}


def test_stream_example(text: str, server: Any, tmp_path: Path, environment: dict[str, str]) -> None:
    block = blocks(text, "test", "python")[1]
    done = run([sys.executable, "-c", block.replace(ADDRESS, server.url)], tmp_path, environment)
    assert done.stdout.split() == ["partial0", "partial1", "partial2", "final"]
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_response_shape(text: str, server: Any) -> None:
    shown = json.loads(blocks(text, "shape", "json")[0])
    body = {"prompt": "two red circles", "seed": 7}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
    assert list(shown) == list(answer) == list(ImagesResponse.model_fields)
    assert set(shown["data"][0]) == set(answer["data"][0])
    assert set(shown["data"][0]["ms"]) == set(answer["data"][0]["ms"])


def said_elsewhere(text: str) -> set[str]:
    """The codes that single modules have for themselves, and the names of all metrics."""
    folder = Path(tdm_app.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r'refusal\(\s*\d{3}, "(\w+)"', source)}
    assert len(codes) > 5
    shown = set(re.findall(r"`(\w+?)(?:_total)?(?:{.*?})?`", text))
    metrics = set(re.findall(r'(?:_gauge|_counter|_labelled)\((?:\w+, )?"(\w+)"', "".join(sources)))
    assert metrics <= shown
    return codes


def test_every_field_and_code_is_named(text: str) -> None:
    codes = {kind.code for kind in TABLE.values()} | set(HTTP_CODES.values()) | set(CODES.values())
    others = {"invalid_type", "body_too_large", "unsupported_media_type", "job_lost", *said_elsewhere(text)}
    for name in {*ImageRequest.model_fields, *codes, *others}:
        assert f"`{name}`" in text, name
    assert Limits().body_bytes == 2**20
    assert "over 1 MiB" in text
