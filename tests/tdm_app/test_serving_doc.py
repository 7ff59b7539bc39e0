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
    (block,) = blocks(text, "test", "bash")
    script = block.replace(ADDRESS, server.url).replace("python -c", f"{sys.executable} -c")
    done = run(["bash", "-euo", "pipefail", "-c", script], tmp_path, environment)
    with Image.open(tmp_path / "circles.png") as picture:
        assert picture.size == (128, 128)
    assert json.loads(done.stdout)["data"][0]["id"] == "default"


def test_client_example(text: str, server: Any, tmp_path: Path, environment: dict[str, str]) -> None:
    (block,) = blocks(text, "test", "python")
    done = run([sys.executable, "-c", block.replace(ADDRESS, server.url)], tmp_path, environment)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["7", "4"], ["8", "4"]]
    assert {path.name for path in tmp_path.iterdir()} == {"7.png", "8.png"}


def test_response_shape(text: str, server: Any) -> None:
    shown = json.loads(blocks(text, "shape", "json")[0])
    body = {"prompt": "two red circles", "seed": 7}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
    assert list(shown) == list(answer) == list(ImagesResponse.model_fields)
    assert set(shown["data"][0]) == set(answer["data"][0])
    assert set(shown["data"][0]["ms"]) == set(answer["data"][0]["ms"])


def test_every_field_and_code_is_named(text: str) -> None:
    codes = {kind.code for kind in TABLE.values()} | set(HTTP_CODES.values()) | set(CODES.values())
    for name in {*ImageRequest.model_fields, *codes, "invalid_type", "body_too_large", "unsupported_media_type"}:
        assert f"`{name}`" in text, name
    assert Limits().body_bytes == 2**20
    assert "over 1 MiB" in text
