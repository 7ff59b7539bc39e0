"""Ratings: given, replaced, deleted, forgotten, and exported as the trainer reads them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from tdm_app import keys
from tdm_app.errors import install_error_handlers
from tdm_app.feedback import Feedback
from tdm_app.request_id import RequestId
from tdm_app.routes.feedback import feedback_router
from tdm_app.security import install_security
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_finetune.rewards.feedback import groups, read_feedback
from tdm_serve import Pipeline
from tdm_serve.cli.main import main
from tdm_serve.core import Request

pytestmark = pytest.mark.anyio
URL = "/v1/feedback"
Check = Callable[..., dict[str, Any]]
Serve = Callable[..., Any]


def recipe(seed: int = 7, prompt: str = "two red circles", **more: Any) -> dict[str, Any]:
    known = {"width": 128, "height": 64, "nfe": 4, "guidance": 1.0, "model": "default", "checkpoint_hash": "5f2c9a"}
    return {"prompt": prompt, "seed": seed, **known, "sigmas": [1.0, 0.9, 0.75, 0.5], **more}


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.close()


@pytest.fixture
async def serve(state: State) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(**given: Any) -> httpx.AsyncClient:
            settings = Settings(**({"feedback": True} | given)).bound_to(loopback=True)
            app = FastAPI()
            app.include_router(feedback_router(Feedback(state, settings)))
            install_error_handlers(app)
            install_security(app, settings, state)
            app.add_middleware(RequestId)
            transport = httpx.ASGITransport(app)
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://localhost"))

        yield start


async def test_a_thumb(serve: Serve, state: State) -> None:
    client = await serve()
    await state.remember({"img_1": recipe()})
    response = await client.post(URL, json={"image_id": "img_1", "rating": "up"})
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"].startswith("fb_")
    assert (answer["object"], answer["ratings"]) == ("feedback", [{"image_id": "img_1", "rating": "up"}])
    (stored,) = (await client.get(URL)).json()["data"]
    assert (stored["id"], stored["rating"], stored["recipe"], stored["owner"]) == (answer["id"], "up", recipe(), "")


async def test_the_last_word_counts(serve: Serve, state: State) -> None:
    client = await serve()
    await state.remember({"img_1": recipe()})
    for rating in ("up", "down", "up", "down"):
        await client.post(URL, json={"image_id": "img_1", "rating": rating})
    assert [stored["rating"] for stored in (await client.get(URL)).json()["data"]] == ["down"]


async def test_a_preference_is_a_like_and_a_dislike(serve: Serve, state: State) -> None:
    client = await serve()
    await state.remember({"img_1": recipe(1), "img_2": recipe(2)})
    answer = (await client.post(URL, json={"image_id": "img_2", "preferred_over": "img_1"})).json()
    assert answer["ratings"] == [{"image_id": "img_2", "rating": "up"}, {"image_id": "img_1", "rating": "down"}]
    assert (await client.delete(f"{URL}/{answer['id']}")).json() == {"object": "feedback.deleted", "deleted": 2}


BAD = {
    "nothing said": ({"image_id": "img_1"}, 400, "invalid_value", "rating", "allowed: rating or preferred_over"),
    "both said": (
        {"image_id": "img_1", "rating": "up", "preferred_over": "img_2"},
        400,
        "invalid_value",
        "preferred_over",
        "allowed: one",
    ),
    "itself": (
        {"image_id": "img_1", "preferred_over": "img_1"},
        400,
        "invalid_value",
        "preferred_over",
        "the picture itself",
    ),
    "sideways": ({"image_id": "img_1", "rating": "sideways"}, 400, "invalid_value", "rating", "'up' or 'down'"),
    "unknown": ({"image_id": "img_9", "rating": "up"}, 404, "not_found", None, "no picture 'img_9' of yours"),
    "unknown other": ({"image_id": "img_1", "preferred_over": "img_9"}, 404, "not_found", None, "'img_9'"),
    "other prompt": (
        {"image_id": "img_1", "preferred_over": "img_3"},
        400,
        "invalid_value",
        "preferred_over",
        "different prompts",
    ),
    "no id": ({"rating": "up"}, 400, "missing_required_parameter", "image_id", "required"),
    "number": ({"image_id": 1, "rating": "up"}, 400, "invalid_type", "image_id", "1"),
    "stars": ({"image_id": "img_1", "rating": "up", "stars": 5}, 400, "unknown_parameter", "stars", "stars"),
}


@pytest.mark.parametrize(("body", "status", "code", "param", "words"), BAD.values(), ids=BAD)
async def test_bad_ratings(
    serve: Serve, state: State, assert_error: Check, body: Any, status: int, code: str, param: str | None, words: str
) -> None:
    client = await serve()
    await state.remember({"img_1": recipe(1), "img_2": recipe(2), "img_3": recipe(3, "a star")})
    error = assert_error(await client.post(URL, json=body), status, code, param)
    assert words in error["message"]
    assert (await client.get(URL)).json()["data"] == []


async def test_without_consent_nothing_is_kept(serve: Serve, state: State, assert_error: Check) -> None:
    on, off = await serve(), await serve(feedback=False)
    await state.remember({"img_1": recipe()})
    given = (await on.post(URL, json={"image_id": "img_1", "rating": "up"})).json()
    error = assert_error(await off.post(URL, json={"image_id": "img_1", "rating": "up"}), 403, "feedback_off")
    assert error["message"] == (
        "feedback is switched off here, so nothing is kept; the setting `feedback` switches it on"
    )
    assert (await off.delete(f"{URL}/{given['id']}")).status_code == 200  # what was kept can still be deleted
    quiet = Feedback(state, Settings(feedback=False))
    await quiet.remember({"img_2": recipe()})
    assert await state.picture("img_2") is None


async def test_everybody_deletes_their_own(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on")
    people = [
        await state.write(keys.create, name, scope) for name, scope in (("a", "user"), ("b", "user"), ("c", "admin"))
    ]
    ids, heads = [key.id for key, _ in people], [{"authorization": f"Bearer {text}"} for _, text in people]
    for number in range(2):
        await state.remember({f"img_{number}_{n}": recipe(n) for n in range(3)}, ids[number])
    given = [
        [
            (
                await client.post(URL, json={"image_id": f"img_{number}_{n}", "rating": "up"}, headers=heads[number])
            ).json()["id"]
            for n in range(3)
        ]
        for number in range(2)
    ]
    assert_error(
        await client.post(URL, json={"image_id": "img_1_0", "rating": "up"}, headers=heads[0]), 404, "not_found"
    )
    assert_error(await client.delete(f"{URL}/{given[1][0]}", headers=heads[0]), 404, "not_found")
    assert_error(await client.delete(URL, params={"owner": ids[1]}, headers=heads[0]), 403, "admin_only")
    assert_error(await client.delete(URL, headers=heads[0]), 400, "invalid_value", "image_id")
    assert_error(await client.get(URL, headers=heads[0]), 403, "admin_only")

    async def deleted(number: int, **params: str) -> int:
        return (await client.delete(URL, params=params, headers=heads[number])).json()["deleted"]

    assert await deleted(0, image_id="img_1_0") == 0
    assert await deleted(0, image_id="img_0_0") == 1
    assert await state.picture("img_0_0") is None  # the recipe holds the prompt
    assert await deleted(0, owner="me") == 2
    assert await deleted(2, owner="me") == 0
    assert (await client.delete(f"{URL}/{given[1][1]}", headers=heads[2])).json()["deleted"] == 1
    assert await deleted(2, owner=ids[1]) == 2
    assert (await client.get(URL, headers=heads[2])).json() == {"object": "list", "data": [], "has_more": False}


async def test_deleted_words_are_in_no_file(serve: Serve, state: State) -> None:
    client = await serve()
    await state.remember({"img_1": recipe(prompt="an unmistakable prompt")})
    await client.post(URL, json={"image_id": "img_1", "rating": "up"})
    await client.delete(URL, params={"image_id": "img_1"})
    held = b"".join(path.read_bytes() for path in state.folder.iterdir())
    assert b"unmistakable" not in held


async def test_the_list_has_pages(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve()
    await state.remember({f"img_{n}": recipe(n) for n in range(7)})
    ids = [(await client.post(URL, json={"image_id": f"img_{n}", "rating": "up"})).json()["id"] for n in range(5)]
    ids.append((await client.post(URL, json={"image_id": "img_5", "preferred_over": "img_6"})).json()["id"])
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await client.get(URL, params={"limit": 2, **after})).json()
        seen += [stored["id"] for stored in page["data"]]
        after = {"after": seen[-1]}
        if not page["has_more"]:
            break
    assert seen == [ids[5], *ids[::-1]]  # the preference is two rows
    assert_error(await client.get(URL, params={"limit": 0}), 400, "invalid_value", "limit")


async def test_what_the_page_uses(state: State, pipeline: Pipeline) -> None:
    feedback = Feedback(state, Settings(feedback=True))
    pictures = pipeline("a star", n=3, seed=1)
    ids = await feedback.ids(pictures)
    assert all(ids)
    await feedback.rate(str(ids[0]), up=False)
    await feedback.prefer(str(ids[1]), over=str(ids[2]))
    likes = {record["seed"]: record["like"] for record in await feedback.records()}
    assert likes == {1: False, 2: True, 3: False}
    off = Feedback(state, Settings(feedback=False))
    assert (off.on, await off.ids(pictures)) == (False, [None] * 3)


def export(folder: Path, file: Path) -> list[dict[str, Any]]:
    assert main(["feedback", "export", str(file), "--state-dir", str(folder)]) == 0
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


async def test_the_trainer_reads_the_export(serve: Serve, state: State, tmp_path: Path) -> None:
    client = await serve()
    await state.remember({"img_1": recipe(1, "zwei Kreise ü"), "img_2": recipe(2, "zwei Kreise ü"), "img_3": recipe(3)})
    await state.remember({"img_4": recipe(4, negative_prompt="blur")})
    await client.post(URL, json={"image_id": "img_2", "preferred_over": "img_1"})
    for image in ("img_3", "img_4"):
        await client.post(URL, json={"image_id": image, "rating": "up"})
    file = tmp_path / "likes.jsonl"
    records = export(state.folder, file)
    keys = ["prompt", "seed", "model", "checkpoint_hash", "size", "like", "time", "sigmas", "guidance"]
    assert [list(record) for record in records] == [keys] * 3  # no place for a negative prompt
    rated = read_feedback(file)
    assert sorted((one.recipe.prompt, one.recipe.seed, one.rating) for one in rated) == [
        ("two red circles", 3, 1.0),
        ("zwei Kreise ü", 1, -1.0),
        ("zwei Kreise ü", 2, 1.0),
    ]
    assert {(one.recipe.width, one.recipe.height, one.recipe.sigmas) for one in rated} == {
        (128, 64, (1, 0.9, 0.75, 0.5))
    }
    (group,) = groups(rated, 2)
    assert (group.prompt, sorted(group.ratings)) == ("zwei Kreise ü", [-1.0, 1.0])


async def test_export_and_delete_on_the_command_line(
    serve: Serve, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = await serve()
    await state.remember({f"img_{n}": recipe(n) for n in range(3)})
    given = [(await client.post(URL, json={"image_id": f"img_{n}", "rating": "up"})).json()["id"] for n in range(3)]
    folder = ["--state-dir", str(state.folder)]
    assert main(["feedback", "export", "-", *folder]) == 0
    assert [json.loads(line)["seed"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2]
    assert main(["feedback", "delete", "--id", given[0], *folder]) == 0
    assert main(["feedback", "delete", "--image", "img_1", *folder]) == 0
    assert main(["feedback", "delete", "--owner", "", *folder]) == 0
    assert capsys.readouterr().out == "deleted 1 ratings\n" * 3
    assert main(["feedback", "delete", "--id", given[0], *folder]) == 2
    assert f"no feedback has the id '{given[0]}'" in capsys.readouterr().err
    assert main(["feedback", "delete", "--all", *folder]) == 0
    assert export(state.folder, tmp_path / "none.jsonl") == []
    assert main(["feedback", "export", str(tmp_path / "no" / "x"), *folder]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
async def test_a_served_picture_is_made_again_from_its_rating(
    start_server: Callable[..., Any], pipeline: Pipeline, tmp_path: Path
) -> None:
    server = start_server("--no-page", "--feedback")
    server.wait_ready()
    body = {"prompt": "a blue ring", "n": 2, "seed": 11}
    data = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()["data"]
    rating = {"image_id": data[1]["image_id"], "preferred_over": data[0]["image_id"]}
    assert httpx.post(server.url + URL, json=rating, timeout=60).status_code == 200
    export(server.state_dir, tmp_path / "likes.jsonl")  # while the server runs
    better = max(read_feedback(tmp_path / "likes.jsonl"), key=lambda one: one.rating)
    assert (better.recipe.seed, better.recipe.checkpoint_hash) == (12, pipeline.info.checkpoint_hash)
    assert better.recipe.sigmas == pytest.approx(pipeline.info.sigmas)
    one = better.recipe
    (again,) = pipeline.generate([Request(one.prompt, one.seed, one.width, one.height, guidance=one.guidance)])
    with Image.open(io.BytesIO(base64.b64decode(data[1]["b64_json"]))) as served:
        assert np.array_equal(np.asarray(served), np.asarray(again.image))
