"""`stream: true`: OpenAI's events, one predicted picture an evaluation, and an end to every stream."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from sse_reader import parse

from tdm_app.errors import problem_of
from tdm_app.schemas import CompletedEvent, PartialImageEvent
from tdm_app.sse import KEEP_ALIVE, EventStream, error_event, event, kept_alive
from tdm_app.streaming import partial_steps
from tdm_serve.errors import DeadlinePassed

URL = "/v1/images/generations"
PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
COMMON = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}
Check = Callable[..., dict[str, Any]]


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.mark.parametrize(
    ("total", "partials", "steps"),
    [
        (4, 3, (1, 2, 3)),
        (4, 0, ()),
        (4, 1, (2,)),
        (4, 2, (1, 3)),
        (8, 3, (2, 4, 6)),
        (20, 3, (5, 10, 15)),
        (2, 3, (1,)),
        (1, 3, ()),
    ],
)
def test_partials_are_spread_over_the_steps(total: int, partials: int, steps: tuple[int, ...]) -> None:
    assert partial_steps(total, partials) == steps


@pytest.mark.parametrize("total", range(1, 30))
@pytest.mark.parametrize("partials", range(4))
def test_partials_never_outnumber_what_was_asked(total: int, partials: int) -> None:
    steps = partial_steps(total, partials)
    assert len(steps) == min(partials, total - 1)
    assert all(1 <= step < total for step in steps)


@pytest.fixture(scope="module")
def images(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).images


def test_three_partials_and_the_final_are_the_four_evaluations(images: Any) -> None:
    plain = images.generate(prompt="two red circles", extra_body={"seed": 7}).data[0]
    stream = images.generate(prompt="two red circles", stream=True, partial_images=3, extra_body={"seed": 7})
    *partials, final = list(stream)
    assert [event.partial_image_index for event in partials] == [0, 1, 2]
    assert {event.type for event in partials} == {PARTIAL}
    assert final.type == COMPLETED
    assert (final.seed, final.nfe, final.model) == (7, 4, "default")
    assert np.array_equal(np.asarray(picture(final.b64_json)), np.asarray(picture(plain.b64_json)))
    assert {picture(event.b64_json).size for event in partials} == {(128, 128)}
    away = [_distance(picture(event.b64_json), picture(final.b64_json)) for event in partials]
    assert away[2] < away[0]  # they get nearer to the final picture


def _distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean())


def test_events_have_all_required_fields(images: Any) -> None:
    stream = images.generate(prompt="a blue ring", stream=True, partial_images=2, quality="low", output_format="jpeg")
    *partials, final = [event.to_dict() for event in stream]
    assert len(partials) == 2
    for shown in (*partials, final):
        assert set(shown) >= COMMON
        assert (shown["size"], shown["quality"], shown["output_format"]) == ("128x128", "low", "jpeg")
        assert picture(shown["b64_json"]).format == "JPEG"
    usage = final["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["text_tokens"] == usage["input_tokens"]


def test_without_partials_there_is_one_event(images: Any) -> None:
    (final,) = list(images.generate(prompt="a blue ring", stream=True))
    assert final.type == COMPLETED


async def collect(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(URL, json={"prompt": "a red circle", "stream": True, **body})


@pytest.mark.anyio
async def test_the_wire(client: httpx.AsyncClient) -> None:
    response = await collect(client, partial_images=3, seed=3)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert float(response.headers["x-eta-ms"]) >= 0
    events, _ = parse(response.text)
    assert [event.name for event in events] == [PARTIAL, PARTIAL, PARTIAL, COMPLETED]
    for event_ in events:
        model = CompletedEvent if event_.name == COMPLETED else PartialImageEvent
        assert model.model_validate(event_.data).type == event_.name


@pytest.mark.anyio
async def test_several_pictures_say_which_they_are(client: httpx.AsyncClient) -> None:
    events, _ = parse((await collect(client, partial_images=3, n=2, seed=3)).text)
    for index in (0, 1):
        mine = [event for event in events if event.data["image_index"] == index]
        assert [event.data.get("partial_image_index") for event in mine] == [0, 1, 2, None]
        assert mine[-1].data["seed"] == 3 + index


@pytest.mark.anyio
async def test_more_steps(client: httpx.AsyncClient) -> None:
    events, _ = parse(
        (await collect(client, partial_images=3, num_inference_steps=8, allow_untrained_schedule=True)).text
    )
    assert [event.name for event in events] == [PARTIAL, PARTIAL, PARTIAL, COMPLETED]
    assert events[-1].data["nfe"] == 8


@pytest.mark.anyio
async def test_what_is_wrong_from_the_start_is_a_plain_error(client: httpx.AsyncClient, assert_error: Check) -> None:
    assert_error(await collect(client, size="1x1"), 400, "invalid_value", "size")
    assert_error(await collect(client, model="other"), 404, "model_not_found", "model")
    assert_error(await collect(client, deadline_ms=0.001), 429, "deadline_unreachable", "deadline_ms")


# Streams without an engine: keep-alive, errors, clients that leave


async def slow(pauses: list[float], ended: list[str]) -> AsyncGenerator[bytes]:
    try:
        for pause in pauses:
            await asyncio.sleep(pause)
            yield event("x", "{}")
    finally:
        ended.append("ended")


@pytest.mark.anyio
async def test_silence_is_filled_with_comments() -> None:
    ended: list[str] = []
    chunks = [chunk async for chunk in kept_alive(slow([0.0, 0.25, 0.0], ended), 0.05)]
    assert [chunk for chunk in chunks if chunk != KEEP_ALIVE] == [b"event: x\ndata: {}\n\n"] * 3
    assert chunks[0] != KEEP_ALIVE
    assert 2 <= chunks.count(KEEP_ALIVE) <= 5
    assert ended == ["ended"]


@pytest.mark.anyio
async def test_an_error_is_an_event_without_a_name() -> None:
    error = DeadlinePassed("too late")
    (shown,), _ = parse(error_event(error).decode())
    assert shown.name == "message"
    assert shown.data == problem_of(error).body()


@pytest.mark.anyio
@pytest.mark.parametrize("after", [0, 1])
async def test_a_client_that_leaves_ends_the_events(after: int) -> None:
    ended: list[str] = []
    sent: list[Any] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    response = EventStream(kept_alive(slow([0.0] * after + [60.0], ended), 60.0))
    running = asyncio.create_task(response({"type": "http"}, receive, send))
    await asyncio.sleep(0.05)
    gone.set()
    async with asyncio.timeout(1):
        await running
    assert ended == ["ended"]
    assert len([message for message in sent if message.get("body")]) == after
