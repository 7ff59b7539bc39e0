"""A reward behind HTTP gives the scores it gives at home; a server that fails, lies or hangs gives a sentence."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch

from tdm_finetune.rewards import RewardPool, load_reward, remote, wire
from tdm_finetune.rewards.server import MAX_BODY_MB, RewardServer
from tdm_serve.errors import ConfigError, RewardError


@contextmanager
def serving(reward: str) -> Iterator[str]:
    """The address of the real server, in a thread."""
    with RewardPool(reward) as pool, RewardServer(("127.0.0.1", 0), reward, pool) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def post(url: str, path: str, body: bytes | None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"} | named)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@contextmanager
def answering(*answers: tuple[int, bytes] | float) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers in turn (the last one for ever); a number is seconds of silence."""
    bodies: list[bytes] = []

    class Script(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            answer = answers[min(len(bodies), len(answers)) - 1]
            if isinstance(answer, float):
                time.sleep(answer)
                return
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, not waited."""
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    return waits


def test_scores_are_those_of_the_reward_at_home(scenes_of) -> None:
    batch = scenes_of(7)
    text = "scenes,jpeg:0.1,scenes-likes(threshold=1)"
    with serving(text) as url:
        there = load_reward(f"http(url={url})")(*batch)
        assert post(url, "/health", None) == (200, {"status": "ok", "reward": text})
    torch.testing.assert_close(there, load_reward(text)(*batch), rtol=0, atol=0)


def test_msgpack_gives_the_same(scenes_of) -> None:
    pytest.importorskip("msgpack")
    batch = scenes_of(7)
    with serving("scenes,jpeg:0.1") as url:
        for form in ("json", "msgpack"):
            there = load_reward(f"http(url={url},format={form})")(*batch)
            torch.testing.assert_close(there, load_reward("scenes,jpeg:0.1")(*batch), rtol=0, atol=0)


def test_msgpack_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ConfigError, match="pip install msgpack"):
        load_reward("http(url=http://127.0.0.1:1,format=msgpack)")
    with serving("jpeg") as url:
        status, answer = post(url, "/", b"x", content_type="application/msgpack")
    assert status == 415 and "pip install msgpack" in answer["error"]


def test_the_body_is_as_documented(scenes_of) -> None:
    batch = scenes_of(2, "position")
    with answering((200, b'{"scores": [1, 0.5]}')) as (url, bodies):
        assert load_reward(f"http(url={url}/score?of=me)")(*batch).tolist() == [1.0, 0.5]
    body = json.loads(bodies[0])
    assert sorted(body) == ["images", "metadata", "prompts"] and body["prompts"] == batch.prompts
    spec = json.loads(json.dumps(asdict(batch.metadata[0]["spec"])))
    assert body["metadata"][0] == {"spec": spec, "category": "position"}
    images, prompts, metadata = wire.unpack_request("json", bodies[0])
    assert torch.equal(images, batch.images) and prompts == batch.prompts and metadata == body["metadata"]


def test_passing_failures_are_tried_again(batch, no_wait: list[float]) -> None:
    good = (200, json.dumps({"scores": [1.0] * 7}).encode())
    with answering((503, b""), (429, b"{}"), (502, b""), good) as (url, bodies):
        assert load_reward(f"http(url={url})")(*batch).tolist() == [1.0] * 7
        assert len(bodies) == 4 and no_wait == [0.25, 0.5, 1.0]
    with answering((504, b"")) as (url, bodies):
        with pytest.raises(RewardError, match=r"gave no answer in 2 attempts; the last problem: status 504"):
            load_reward(f"http(url={url},retries=1)")(*batch)
        assert len(bodies) == 2
    assert max(min(remote.FIRST_WAIT_S * 2**n, remote.MAX_WAIT_S) for n in range(20)) == 8.0


def test_nobody_listens_and_nobody_answers(batch, no_wait: list[float]) -> None:
    with answering((200, b"")) as (url, _):
        pass  # the port is free again
    with pytest.raises(RewardError, match="ConnectionRefusedError"):
        load_reward(f"http(url={url})")(*batch)
    assert len(no_wait) == 3


def test_an_attempt_takes_no_longer_than_its_time_out(batch) -> None:
    with answering(1.0) as (url, _):
        started = time.perf_counter()
        with pytest.raises(RewardError, match="no answer in 1 attempt; the last problem: TimeoutError"):
            load_reward(f"http(url={url},timeout_s=0.2,retries=0)")(*batch)
        assert time.perf_counter() - started < 0.9


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"[1, 2]"), "something else than a reward"),
        ((200, b"<html>"), "something else than a reward"),
        ((200, b"{}"), "without a list of numbers under 'scores'"),
        ((200, b'{"scores": ["high"]}'), "without a list of numbers"),
        ((200, b'{"scores": [true, 1, 1, 1, 1, 1, 1]}'), "without a list of numbers"),
        ((200, b'{"scores": [NaN, 1, 1, 1, 1, 1, 1]}'), "without a list of numbers"),
        ((200, b'{"scores": [1, 2]}'), "returned shape (2,)"),
        ((400, b'{"error": "images[3] is no PNG"}'), "answered 400: images[3] is no PNG"),
        ((500, b'{"error": "out of memory"}'), "answered 500: out of memory"),
        ((404, b"not here"), "answered 404 with something else"),
    ],
)
def test_answers_that_are_no_scores(batch, no_wait: list[float], answer: tuple[int, bytes], said: str) -> None:
    with answering(answer) as (url, bodies):
        with pytest.raises(RewardError) as caught:
            load_reward(f"http(url={url})")(*batch)
        assert said in str(caught.value) and "'http'" in str(caught.value)
        assert len(bodies) == 1 and not no_wait  # no reason to try again


@pytest.mark.parametrize("url", ["127.0.0.1:9000", "ftp://host/", "http://", "http://host:port/", "http://[::1/"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="http: url is"):
        load_reward(f"http(url={url})")


@pytest.mark.parametrize("options", ["timeout_s=0", "retries=-1", "timeout_s=nan"])
def test_impossible_patience(options: str) -> None:
    with pytest.raises(ConfigError, match="timeout_s must be above 0"):
        load_reward(f"http(url=http://127.0.0.1:1,{options})")


def test_metadata_that_json_cannot_hold(batch) -> None:
    batch.metadata[2]["tensor"] = torch.zeros(1)
    with pytest.raises(RewardError, match=r"cannot judge sample 2 .*Tensor has no form in JSON"):
        load_reward("http(url=http://127.0.0.1:1,retries=0)")(*batch)


def valid(**changes: Any) -> bytes:
    """A request for the server with some keys changed."""
    body = json.loads(wire.pack_request("json", torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["a", "b"], [{}, {}]))
    return json.dumps(body | changes).encode()


PNG_9X9 = json.loads(wire.pack_request("json", torch.zeros(1, 9, 9, 3, dtype=torch.uint8), ["a"], [{}]))["images"][0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is no json"),
        (b"[]", "the body is list; it must be an object"),
        (b"{}", "the lists 'images', 'prompts' and 'metadata'"),
        (valid(prompts="ab"), "the lists 'images'"),
        (valid(prompts=["a"]), "2 images, 1 prompts"),
        (valid(images=[], prompts=[], metadata=[]), "at least one"),
        (valid(prompts=["a", 3]), "prompts[1] must be text"),
        (valid(metadata=[{}, None]), "metadata[1] must be an object"),
        (valid(images=["ÄÖ", "x"]), "images[0]"),
        (valid(images=["AAAA", "AAAA"]), "images[0] is no PNG"),
        (valid(images=[3, 4]), "images[0] must be a PNG, as base64 text"),
        (valid(images=[PNG_9X9, json.loads(valid())["images"][0]]), "images differ in size: [(8, 8), (9, 9)]"),
    ],
)
def test_the_server_says_what_is_wrong_with_a_body(jpeg_server: str, body: bytes, said: str) -> None:
    status, answer = post(jpeg_server, "/", body)
    assert status == 400 and said in answer["error"]
    assert post(jpeg_server, "/", valid())[0] == 200


@pytest.fixture(scope="module")
def jpeg_server() -> Iterator[str]:
    with serving("jpeg") as url:
        yield url


def test_the_server_refuses_what_it_need_not_read(jpeg_server: str) -> None:
    assert post(jpeg_server, "/other", valid())[0] == 404
    assert post(jpeg_server, "/other", None)[0] == 404
    status, answer = post(jpeg_server, "/", b"", content_length=str((MAX_BODY_MB + 1) << 20))
    assert status == 413 and f"at most {MAX_BODY_MB}" in answer["error"]
    status, answer = post(jpeg_server, "/", b"", content_length="many")
    assert status == 411 and "content-length" in answer["error"]


def test_pictures_are_measured_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch, jpeg_server: str) -> None:
    monkeypatch.setattr(wire, "MAX_SIDE", 7)
    status, answer = post(jpeg_server, "/", valid())
    assert status == 400 and "images[0] has 8 x 8 pixels; at most 7 a side" in answer["error"]


def test_a_reward_that_fails_behind_the_server(scenes_of, no_wait: list[float]) -> None:
    batch = scenes_of(3)
    batch.metadata[1] = {}
    with serving("scenes") as url, pytest.raises(RewardError) as caught:
        load_reward(f"http(url={url})")(*batch)
    assert "answered 500: the reward 'scenes' cannot judge sample 1" in str(caught.value)
    assert not no_wait


@pytest.mark.slow  # a process that imports torch
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_server_in_a_process_of_its_own(scenes_of, environment: dict[str, str], ending: signal.Signals) -> None:
    command = [sys.executable, "-m", "tdm_finetune.rewards.server", "scenes", "--port", "0"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            found = re.fullmatch(r"serving scenes on (http://127\.0\.0\.1:\d+)\n", said)
            assert found, said
            batch = scenes_of(5)
            assert load_reward(f"http(url={found[1]})")(*batch).tolist() == [1.0] * 5
            taken = [*command[:-1], found[1].rpartition(":")[2]]
            second = subprocess.run(taken, env=environment, capture_output=True, text=True, timeout=60, check=False)
            assert second.returncode == 1 and "error: cannot listen on 127.0.0.1" in second.stderr
            server.send_signal(ending)
            assert server.wait(20) == 0
        finally:
            server.kill()


@pytest.mark.parametrize("reward", ["nosuch", "http(", "clip"])
def test_a_server_that_cannot_start(reward: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tdm_finetune.rewards.server import main

    assert main([reward, "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
