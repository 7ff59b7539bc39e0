"""Clicks that train: what counts as material, how a training stands, and one real training from ratings to pixels."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import metric, serving, wait_for, wait_ready

from tdm_app import keys
from tdm_app.api import create_app
from tdm_app.feedback_table import DISLIKE, LIKE, Rating
from tdm_app.online import table
from tdm_app.online.material import is_trainable, material_of
from tdm_app.online.process import Folder, environment, last_words
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_serve import AsyncEngine, Pipeline
from tdm_serve.engine import Engine
from tdm_serve.models.catalog import EMBEDDED

TRAINING, IMAGES, FEEDBACK = "/v1/training", "/v1/images/generations", "/v1/feedback"
PROMPT = "two red circles"
PATIENCE_S = 400.0
TINY = """
run = "unused"
groups = 1
group = 2
steps = {steps}
warmup = 1
decay_steps = 1
fake_warmup = 0
rank = 32
save_every = 1
score_every = 1000
score_prompts = 2
precision = "fp32"
"""
Check = Callable[..., dict[str, Any]]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.close()


@asynccontextmanager
async def opened(pipeline: Pipeline, state: State, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A started service in this process."""
    chosen = Settings.model_validate({"feedback": True, "online_training": True, **settings})
    app = create_app(AsyncEngine(pipeline), chosen, state, page=False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        await app.state.service.started()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))


async def rate(client: httpx.AsyncClient, *thumbs: str, **body: Any) -> None:
    """Makes as many pictures of one prompt, and rates them."""
    asked = {"prompt": PROMPT, "n": len(thumbs), "seed": 1, **body}
    made = (await client.post(IMAGES, json=asked)).json()["data"]
    for picture, thumb in zip(made, thumbs, strict=True):
        given = await client.post(FEEDBACK, json={"image_id": picture["image_id"], "rating": thumb})
        assert given.status_code == 200


@pytest.mark.anyio
async def test_what_cannot_begin_says_why(pipeline: Pipeline, state: State, assert_error: Check) -> None:
    async with opened(pipeline, state) as client:
        found = (await client.get(TRAINING)).json()
        assert (found["enabled"], found["data"], found["min_ratings"]) == (True, [], 40)
        assert_error(await client.post(TRAINING, json={"model": "elsewhere"}), 404, "model_not_found", "model")
        nothing = assert_error(await client.post(TRAINING, json={}), 400, "invalid_value", "model")
        assert "nothing to learn" in nothing["message"]
        await rate(client, "up", "up")  # alike, so that neither is better
        assert_error(await client.post(TRAINING, json={}), 400, "invalid_value", "model")
        assert_error(await client.post(TRAINING, json={"steps": 1}), 400, "unknown_parameter", "steps")
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/load")):
            assert_error(await client.request(method, f"{TRAINING}/train_no{path}"), 404, "not_found")
        [material] = (await client.get(TRAINING)).json()["material"]
        assert material == {"model": "default", "pictures": 2, "groups": 0, "new_ratings": 2}


@pytest.mark.anyio
async def test_it_is_off_unless_switched_on_and_for_admins(
    pipeline: Pipeline, state: State, assert_error: Check
) -> None:
    async with opened(pipeline, state, online_training=False) as client:
        assert not (await client.get(TRAINING)).json()["enabled"]
        assert "online_training" in assert_error(await client.post(TRAINING, json={}), 403, "training_off")["message"]
    async with opened(pipeline, state, auth="on") as client:
        _, key = await state.write(keys.create, "somebody", "user")
        mine = {"authorization": f"Bearer {key}"}
        assert_error(await client.get(TRAINING, headers=mine), 403, "admin_only")
        assert_error(await client.post(TRAINING, json={}, headers=mine), 403, "admin_only")
        assert_error(await client.get(TRAINING), 401, "invalid_api_key")


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_trainer_that_fails_is_a_sentence(pipeline: Pipeline, state: State, assert_error: Check) -> None:
    async with opened(pipeline, state, online_config="no-such-config") as client:
        await rate(client, "up", "down")
        begun = await client.post(TRAINING, json={"model": "default"})
        assert begun.status_code == 202
        one = begun.json()
        assert (one["status"], one["version"], one["ratings"], one["groups"]) == ("running", "default-online-1", 2, 1)
        assert_error(await client.post(TRAINING, json={}), 409, "already_running")
        while (one := (await client.get(f"{TRAINING}/{one['id']}")).json())["status"] == "running":
            await asyncio.sleep(0.05)
        assert one["status"] == "failed"
        assert one["error"].startswith("config 'no-such-config' is neither a file nor a shipped config")
        assert one["finished_at"] >= one["created_at"]
        assert_error(await client.post(f"{TRAINING}/{one['id']}/load"), 409, "cannot_load")
        assert_error(await client.delete(f"{TRAINING}/{one['id']}"), 409, "already_finished")
        assert (await client.get(TRAINING)).json()["material"][0]["new_ratings"] == 0  # it is not tried again by itself
    folder = Folder(state.folder / "online" / "1")
    assert not folder.ratings.exists(), "what people said is kept in the database only"
    assert "--feedback" in folder.log.read_text()


@pytest.mark.anyio
async def test_a_training_that_was_left_running_is_marked(pipeline: Pipeline, state: State) -> None:
    left, often = [await state.write(table.add, "default", "default", 2, 1) for _ in range(2)]
    for _ in range(2):
        await state.write(table.again, often.id)
    await state.write(table.set_loaded, left.id, loaded=True)  # of a version that is gone
    async with opened(pipeline, state, online_training=False) as client:
        found = (await client.get(f"{TRAINING}/{left.id}")).json()
        assert (found["status"], found["loaded"]) == ("interrupted", False)
        assert "without `online_training`" in found["error"]
    again = await state.write(table.add, "default", "default", 2, 1)
    for _ in range(2):
        await state.write(table.again, again.id)
    async with opened(pipeline, state) as client:
        found = (await client.get(f"{TRAINING}/{again.id}")).json()
        assert (found["status"], found["version"]) == ("interrupted", "default-online-3")
        assert "stopped 3 times" in found["error"]


def rating(pipeline: Pipeline, seed: int, like: bool, created_s: float = 5.0, **changes: Any) -> Rating:
    info = pipeline.info
    recipe = {
        "prompt": PROMPT, "seed": seed, "model": info.id, "checkpoint_hash": info.checkpoint_hash, "guidance": 1.0,
        "width": info.width, "height": info.height, "sigmas": list(info.sigmas), **changes,
    }  # fmt: skip
    return Rating(f"fb_{seed}", f"img_{seed}", "", LIKE if like else DISLIKE, created_s, recipe)


def test_only_pictures_as_the_version_itself_makes_them_are_material(pipeline: Pipeline) -> None:
    own = [rating(pipeline, 1, like=True), rating(pipeline, 2, like=False, created_s=9.0)]
    others = [
        rating(pipeline, 3, like=True, checkpoint_hash="another"),
        rating(pipeline, 4, like=True, width=64),
        rating(pipeline, 5, like=True, sigmas=[1.0]),
        rating(pipeline, 6, like=True, guidance=2.0),
        rating(pipeline, 7, like=True, negative_prompt="rings"),
    ]
    found = material_of([*own, *others], pipeline.info, since_s=5.0)
    assert (found.ratings, found.groups.usable, found.fresh) == (tuple(own), 1, 1)
    assert is_trainable(pipeline.info)
    assert not is_trainable(replace(pipeline.info, guidance=3.0))


def test_progress_and_last_words(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.progress() == (0, 0)
    folder.run.mkdir()
    (folder.run / "config.json").write_text(json.dumps({"config": {"steps": 60}}))
    assert folder.progress() == (0, 60)
    (folder.run / "log.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    assert folder.progress() == (20, 60)
    assert "code 1" in last_words(folder, 1)
    assert "SIGKILL" in last_words(folder, -signal.SIGKILL)
    folder.log.write_text("starting\nerror: the disk is full\nTraceback:\n  File x\nValueError: bad\nbye\n")
    assert last_words(folder, 1) == "ValueError: bad"
    folder.log.write_text("starting\nerror: the disk is full\n")
    assert last_words(folder, 2) == "the disk is full"


def test_the_trainer_has_its_own_threads_and_no_secret() -> None:
    found = environment(3, {"PATH": "/bin", "TDM_SERVE_ADMIN_KEY": "a secret", "OMP_NUM_THREADS": "16"})
    assert (found["OMP_NUM_THREADS"], found["PATH"], "TDM_SERVE_ADMIN_KEY" in found) == ("3", "/bin", False)


@pytest.mark.slow
def test_the_trainer_ends_with_the_server(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tdm_app.online.child", "serve", "--port", "0", "--state-dir", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert b"http" in child.stdout.readline()
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == 19
        child.stdin.close()  # as the end of the server does, however it ends
        assert child.wait(20) in {0, -signal.SIGTERM}


@contextmanager
def server(state: State, config: Path, models: list[str], **settings: Any) -> Iterator[str]:
    chosen = Settings.model_validate(
        {"feedback": True, "online_training": True, "online_config": str(config), "online_min_ratings": 1000} | settings
    )
    engine = AsyncEngine(Engine.load(models, device="cpu", growing=True))
    with serving(create_app(engine, chosen, state, page=False)) as url:
        wait_ready(url)
        yield url


def ended(url: str, training: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while (found := httpx.get(f"{url}{TRAINING}/{training['id']}", timeout=30).json())["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def rated(url: str, model: str) -> None:
    asked = {"prompt": PROMPT, "n": 4, "seed": 5, "model": model}
    for picture, thumb in zip(picture_of(url, **asked)["data"], ("up", "down", "down", "up"), strict=True):
        httpx.post(url + FEEDBACK, json={"image_id": picture["image_id"], "rating": thumb}, timeout=30)


def picture_of(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(url + IMAGES, json={"prompt": PROMPT, "seed": 5, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def begun(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(url + TRAINING, json=body, timeout=30)
    assert answer.status_code == 202, answer.text
    return answer.json()


@pytest.mark.slow
def test_ratings_become_a_version_that_is_served(tmp_path: Path) -> None:
    config, folder = tmp_path / "tiny.toml", tmp_path / "state"
    config.write_text(TINY.format(steps=2))
    state = State(folder)
    with server(state, config, ["default"]) as url:
        rated(url, "default")
        first = ended(url, begun(url))
        assert (first["status"], first["error"], first["step"], first["steps"]) == ("succeeded", None, 2, 2)
        files = Folder(folder / "online" / "1")
        assert not files.ratings.exists()
        assert (files.checkpoint / "transformer").resolve() == EMBEDDED / "transformer"
        before = picture_of(url)
        assert httpx.post(f"{url}{IMAGES}", json={"prompt": PROMPT, "model": first["version"]}).status_code == 404
        loaded = httpx.post(f"{url}{TRAINING}/{first['id']}/load", timeout=60).json()
        assert loaded["loaded"]
        after = picture_of(url, model=first["version"])
        assert (after["model"], after["data"][0]["nfe"]) == ("default-online-1", 4)
        assert after["data"][0]["b64_json"] != before["data"][0]["b64_json"]
        assert picture_of(url)["data"][0]["b64_json"] == before["data"][0]["b64_json"]
        assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]] == ["default", "default-online-1"]
        assert "default-online-1" in httpx.get(f"{url}/v1/capabilities").json()["shapes"][0]["predicted_ms"]
        rated(url, "default-online-1")
        config.write_text(TINY.format(steps=400))
        second = begun(url, model="default-online-1")  # a version that was trained here is trained further
        wait_for((folder / "online" / "2" / "run" / "state.pt").exists, PATIENCE_S)
    state.close()
    state = State(folder)  # the server was stopped in the middle of it
    with server(state, config, ["default"]) as url:
        assert picture_of(url, model="default-online-1")["data"][0]["b64_json"] == after["data"][0]["b64_json"]
        going_on = httpx.get(f"{url}{TRAINING}/{second['id']}").json()
        assert (going_on["status"], going_on["version"]) == ("running", "default-online-2")
        log = folder / "online" / "2" / "train.log"
        wait_for(lambda: "resuming" in log.read_text(), PATIENCE_S)
        cancelled = httpx.delete(f"{url}{TRAINING}/{second['id']}", timeout=60).json()
        assert cancelled["status"] == "cancelled"
        config.write_text(TINY.format(steps=1))
        third = ended(url, begun(url, model="default-online-1"))
        assert (third["status"], third["error"]) == ("succeeded", None)
        assert httpx.post(f"{url}{TRAINING}/{third['id']}/load", timeout=60).json()["loaded"]
        assert picture_of(url, model="default-online-3")["data"][0]["nfe"] == 4
        assert metric(url, "tdm_serve:images_total") >= 2
    state.close()


@pytest.mark.slow
def test_enough_ratings_begin_a_training_by_themselves(tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.format(steps=1))
    state = State(tmp_path / "state")
    with server(state, config, ["default"], online_min_ratings=4) as url:
        rated(url, "default")
        wait_for(lambda: bool(httpx.get(url + TRAINING).json()["data"]))
        [one] = httpx.get(url + TRAINING).json()["data"]
        assert ended(url, one)["status"] == "succeeded"
        assert len(httpx.get(url + TRAINING).json()["data"]) == 1
    state.close()
