"""Settings that change how a picture is made: refused where they cannot be honoured, and told in answer and recipe."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from PIL import Image

from tdm_app.api import create_app
from tdm_app.service import Service
from tdm_app.settings import Settings
from tdm_serve import AsyncEngine, Pipeline
from tdm_serve.core import RECIPE_KEY, Request
from tdm_serve.engine import Engine

URL = "/v1/images/generations"
LONG = "a red star left of a blue ring " * 20
MODELS = ["default", "default-tdm", "default-teacher"]

Check = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
async def separate(anyio_backend: str) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """Three versions of one base with their adapters apart; ratings are kept."""
    engine = AsyncEngine(Engine.load(MODELS, adapters="separate"))
    app = create_app(engine, Settings.model_validate({"feedback": True}), page=False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120)
        yield await stack.enter_async_context(client), app.state.service


async def made(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"prompt": "a red star", "seed": 3, "size": "64x64", **body})
    assert response.status_code == 200, response.text
    return response.json()["data"][0]


def recipe_of(data: dict[str, Any]) -> dict[str, Any]:
    with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as picture:
        return json.loads(picture.info[RECIPE_KEY])


def is_made_again(data: dict[str, Any], device: Any) -> bool:
    """Whether the recipe in a picture makes its pixels."""
    [again] = device.generate([Request.from_recipe(recipe_of(data))])
    with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as picture:
        return picture.tobytes() == again.image.tobytes() and again.recipe() == recipe_of(data)


@pytest.mark.parametrize("path", [URL, "/v1/jobs"])
async def test_a_schedule_that_was_not_trained_is_refused(
    client: httpx.AsyncClient, assert_error: Check, path: str
) -> None:
    response = await client.post(path, json={"prompt": "a red star", "num_inference_steps": 8})
    message = assert_error(response, 400, "invalid_value", "num_inference_steps")["message"]
    assert message.startswith("steps is 8, but default was trained for 4; ")
    assert "allow_untrained_schedule" in message


async def test_an_untrained_schedule_says_so(client: httpx.AsyncClient, pipeline: Pipeline) -> None:
    data = await made(client, num_inference_steps=3, allow_untrained_schedule=True)
    assert (data["nfe"], data["untrained_schedule"]) == (3, True)
    assert recipe_of(data)["untrained_schedule"] is True
    assert is_made_again(data, pipeline)
    usual = await made(client, num_inference_steps=4, allow_untrained_schedule=True)
    assert (usual["nfe"], usual["untrained_schedule"]) == (4, False)
    assert "untrained_schedule" not in recipe_of(usual)


async def test_jobs_streams_and_ratings_say_so_too(separate: tuple[httpx.AsyncClient, Service]) -> None:
    client, service = separate
    body = {"prompt": "a red star", "size": "64x64", "num_inference_steps": 3, "allow_untrained_schedule": True}
    streamed = await client.post(URL, json=body | {"stream": True})
    completed = json.loads(streamed.text.rpartition("data: ")[2])
    assert completed["type"] == "image_generation.completed" and completed["untrained_schedule"] is True
    job = (await client.post("/v1/jobs", json=body)).json()
    await client.get(f"/v1/jobs/{job['id']}/events")  # until it ends
    result = (await client.get(f"/v1/jobs/{job['id']}")).json()["result"]["data"][0]
    assert result["untrained_schedule"] is True
    for image_id in (completed["image_id"], result["image_id"]):
        kept = await service.state.picture(image_id)
        assert kept is not None and kept.recipe["untrained_schedule"] is True


async def test_a_multi_step_base_takes_any_count(separate: tuple[httpx.AsyncClient, Service]) -> None:
    data = await made(separate[0], model="default-teacher", num_inference_steps=3, guidance_scale=0)
    assert (data["nfe"], data["untrained_schedule"]) == (3, False)


@pytest.mark.parametrize(("scale", "nfe"), [(0, 4), (1.0, 8), (2.5, 8)])
async def test_guidance_in_the_familys_convention(
    client: httpx.AsyncClient, pipeline: Pipeline, scale: float, nfe: int
) -> None:
    """Z-Image's: 0 is off, and the weight inside is one more."""
    data = await made(client, guidance_scale=scale)
    assert (data["nfe"], recipe_of(data)["guidance"]) == (nfe, 1.0 + scale)
    assert is_made_again(data, pipeline)


async def test_the_convention_is_told(separate: tuple[httpx.AsyncClient, Service]) -> None:
    client, _ = separate
    shown = (await client.get("/v1/capabilities")).json()
    off = {"default": 0.0, "off": 0.0}
    assert shown["guidance"] == {"default": off, "default-tdm": off, "default-teacher": {"default": 2.0, "off": 0.0}}
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    facts = ("steps", "free_steps", "guidance_scale", "guidance_off", "adapter")
    assert [cards["default"][fact] for fact in facts] == [4, False, 0.0, 0.0, "separate"]
    assert [cards["default-teacher"][fact] for fact in facts] == [25, True, 2.0, 0.0, "none"]


async def test_a_negative_prompt_needs_guidance(client: httpx.AsyncClient, assert_error: Check) -> None:
    for body in ({}, {"guidance_scale": 0}):
        response = await client.post(URL, json={"prompt": "a star", "negative_prompt": "blur", **body})
        assert "nothing would read it" in assert_error(response, 400, "invalid_value", "negative_prompt")["message"]


async def test_adapters_have_a_strength_where_they_are_separate(separate: tuple[httpx.AsyncClient, Service]) -> None:
    client, service = separate
    device = service.engine._device
    data = {scale: await made(client, adapter_scale=scale) for scale in (0, 0.5, 1)}
    assert [one["adapter_scale"] for one in data.values()] == [0, 0.5, 1]
    assert all(is_made_again(one, device) for one in data.values())
    assert len({one["b64_json"] for one in data.values()}) == 3
    assert recipe_of(data[0.5])["adapter_scale"] == 0.5
    assert recipe_of(data[1]) == recipe_of(await made(client))  # 1 is the default
    plain = await made(client, model="default-teacher", num_inference_steps=4, guidance_scale=0)
    pixels = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).tobytes() for one in (plain, data[0])]
    assert pixels[0] == pixels[1]  # 0 is the base, here on the same schedule


async def test_a_strength_that_cannot_be_had_is_refused(
    client: httpx.AsyncClient, separate: tuple[httpx.AsyncClient, Service], assert_error: Check
) -> None:
    body = {"prompt": "a star", "adapter_scale": 0.5}
    fused = assert_error(await client.post(URL, json=body), 400, "invalid_value", "adapter_scale")["message"]
    assert fused.startswith("adapter_scale is 0.5, but default has its adapter in its weights; ")
    bare = await separate[0].post(URL, json=body | {"model": "default-teacher"})
    assert "default-teacher has no adapter" in assert_error(bare, 400, "invalid_value", "adapter_scale")["message"]
    for scale in (-0.1, 10.5):
        response = await separate[0].post(URL, json=body | {"adapter_scale": scale})
        assert "between 0" in assert_error(response, 400, "invalid_value", "adapter_scale")["message"]


async def test_a_prompt_is_cut_on_request(client: httpx.AsyncClient, assert_error: Check, pipeline: Pipeline) -> None:
    refused = await client.post(URL, json={"prompt": LONG})
    assert "truncate_prompt" in assert_error(refused, 400, "prompt_too_long", "prompt")["message"]
    data = await made(client, prompt=LONG, truncate_prompt=True)
    assert data["truncated"] is True
    assert (recipe_of(data)["truncated"], recipe_of(data)["prompt"]) == (True, LONG)
    assert is_made_again(data, pipeline)
    short = await made(client, truncate_prompt=True)
    assert short["truncated"] is False and "truncated" not in recipe_of(short)
