"""`tdm-serve keys`: made, shown once, listed, revoked; a server that runs knows at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tdm_serve.cli.main import main

KEY = re.compile(r"tdm_([0-9a-f]{12})_[A-Za-z0-9_-]{43}\n")
Capture = pytest.CaptureFixture[str]


def test_a_key_is_made_listed_and_revoked(tmp_path: Path, capsys: Capture) -> None:
    folder = ["--state-dir", str(tmp_path / "state")]
    assert main(["keys", "create", "my laptop", *folder]) == 0
    printed = KEY.fullmatch(capsys.readouterr().out)
    assert printed
    assert main(["keys", "create", "prometheus", "--scope", "admin", *folder]) == 0
    capsys.readouterr()
    assert main(["keys", "list", *folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{printed[1]}  user   20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ  -        my laptop", lines[1])
    assert lines[2].endswith("prometheus")
    assert printed[0].strip() not in "\n".join(lines)
    assert main(["keys", "revoke", printed[1], *folder]) == 0
    assert capsys.readouterr().out == f"revoked {printed[1]}\n"
    assert main(["keys", "revoke", printed[1], *folder]) == 2
    expected = f"error: no key in use has the id '{printed[1]}'; `tdm-serve keys list` shows all\n"
    assert capsys.readouterr().err == expected
    assert main(["keys", "list", *folder]) == 0
    assert len(re.findall(r"\d\dZ", capsys.readouterr().out)) == 3


BAD = {
    "no action": (["keys"], "ACTION"),
    "no name": (["keys", "create"], "NAME"),
    "empty name": (["keys", "create", " ", "--state-dir", "."], "the key's name is ' '; allowed: 1 to 100 printable"),
    "unknown scope": (["keys", "create", "x", "--scope", "root"], "'root'"),
    "nothing there": (["keys", "list", "--state-dir", "nowhere"], "no service has kept its state in nowhere"),
    "nothing to export": (["feedback", "export", "x", "--state-dir", "nowhere"], "no service has kept its state"),
    "nothing said": (["feedback", "delete"], "--id"),
    "two things said": (["feedback", "delete", "--id", "a", "--all"], "not allowed with"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tdm_serve.cli", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_running_server_knows_at_once(start_server: Callable[..., Any], capsys: Capture) -> None:
    server = start_server("--no-page", "--auth", "on")
    folder = ["--state-dir", str(server.state_dir)]
    server.wait_ready()
    assert "no API key is in use, so nobody is let in" in server.errors()
    assert main(["keys", "create", "me", *folder]) == 0
    text = capsys.readouterr().out.strip()
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {text}"}, timeout=60) as client:
        url, body = "/v1/images/generations", {"prompt": "a star", "seed": 1, "response_format": "url"}
        picture = client.post(url, json=body)
        assert picture.status_code == 200
        with httpx.Client(timeout=60) as stranger:
            assert stranger.get(picture.json()["data"][0]["url"]).content.startswith(b"\x89PNG")
            refused = stranger.post(server.url + url, json=body)
            assert refused.status_code == 401
            assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
            assert refused.headers["x-request-id"]
            large = stranger.post(server.url + url, content=b" " * 2**20, headers={"content-type": "application/json"})
            assert large.status_code == 401  # and the answer is read, not a broken connection
        assert client.get("/metrics").status_code == 403
        assert main(["keys", "revoke", text.split("_")[1], *folder]) == 0
        assert client.post(url, json=body).status_code == 401
    assert text not in server.errors()
