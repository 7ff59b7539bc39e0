"""The official client against the real server process: what works with OpenAI works here."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

PROMPT = "two red circles"


@pytest.fixture(scope="module")
def images(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client.images


@pytest.fixture(scope="module")
def models(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client.models


def picture(data: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def pixels(data: Any) -> np.ndarray:
    return np.asarray(picture(data))


def test_one_picture(images: Any) -> None:
    answer = images.generate(prompt=PROMPT, extra_body={"seed": 7})
    assert answer.created > 1_700_000_000
    assert (answer.size, answer.output_format, answer.background, answer.quality) == (
        "128x128",
        "png",
        "opaque",
        "high",
    )
    assert answer.usage.output_tokens == 64  # blocks of 16 x 16 pixels
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens > 3
    (data,) = answer.data
    assert picture(data).size == (128, 128)
    assert (data.seed, data.nfe) == (7, 4)
    assert {"text", "denoise", "decode", "total"} <= set(data.ms)
    assert all(value >= 0 for value in data.ms.values())


def test_png_carries_its_recipe(images: Any) -> None:
    (data,) = images.generate(prompt=PROMPT, extra_body={"seed": 7}).data
    chunks = picture(data).info
    recipe = json.loads(chunks["tdm-serve"])
    assert (recipe["prompt"], recipe["seed"], recipe["nfe"], recipe["model"]) == (PROMPT, 7, 4, "default")
    assert chunks["prompt"] == PROMPT


def test_n_pictures_get_consecutive_seeds(images: Any) -> None:
    answer = images.generate(prompt=PROMPT, n=2, extra_body={"seed": 40})
    assert [data.seed for data in answer.data] == [40, 41]
    assert not np.array_equal(*map(pixels, answer.data))


def test_a_seed_makes_the_same_pixels_twice_and_in_any_company(images: Any) -> None:
    first = images.generate(prompt=PROMPT, extra_body={"seed": 7}).data[0]
    again = images.generate(prompt=PROMPT, extra_body={"seed": 7}).data[0]
    of_three = images.generate(prompt=PROMPT, n=3, extra_body={"seed": 5}).data[2]
    assert of_three.seed == 7
    assert np.array_equal(pixels(first), pixels(again))
    assert np.array_equal(pixels(first), pixels(of_three))


def test_concurrent_requests_get_their_own_pictures(images: Any) -> None:
    prompts = [PROMPT, "a blue ring left of a star", "a green square", 'the word "CAT" in red'] * 3
    alone = {text: pixels(images.generate(prompt=text, extra_body={"seed": 3}).data[0]) for text in set(prompts)}
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda text: images.generate(prompt=text, extra_body={"seed": 3}), prompts))
    for text, answer in zip(prompts, answers, strict=True):
        assert np.array_equal(pixels(answer.data[0]), alone[text])


def test_a_seed_is_drawn_when_none_is_given(images: Any) -> None:
    seeds = {images.generate(prompt=PROMPT).data[0].seed for _ in range(3)}
    assert len(seeds) == 3


def test_all_documented_values_are_taken(images: Any) -> None:
    answer = images.generate(
        prompt=PROMPT, model="default", n=1, size="auto", quality="hd", response_format="b64_json", background="auto",
        moderation="low", style="natural", user="somebody", partial_images=0, output_format="png", stream=False,
    )  # fmt: skip
    assert answer.quality == "high"


@pytest.mark.parametrize(("name", "mode"), [("jpeg", "RGB"), ("webp", "RGB"), ("png", "RGB")])
def test_output_formats(images: Any, name: str, mode: str) -> None:
    answer = images.generate(prompt=PROMPT, output_format=name, extra_body={"seed": 7})
    shown = picture(answer.data[0])
    assert (shown.format, shown.mode, answer.output_format) == (name.upper(), mode, name)


def test_compression_makes_smaller_files(images: Any) -> None:
    def size(quality: int) -> int:
        answer = images.generate(
            prompt=PROMPT, output_format="jpeg", output_compression=quality, extra_body={"seed": 7}
        )
        return len(answer.data[0].b64_json)

    assert size(10) < size(100)


def test_another_size(images: Any) -> None:
    answer = images.generate(prompt=PROMPT, size="160x96")
    assert answer.size == "160x96"
    assert picture(answer.data[0]).size == (160, 96)


def test_characters_that_the_tokenizer_never_saw(images: Any) -> None:
    assert images.generate(prompt="зелёный круг 緑 🟢", extra_body={"seed": 1}).data[0].nfe == 4


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"prompt": "  "}, "prompt", "invalid_value"),
        ({"prompt": "red " * 500}, "prompt", "prompt_too_long"),
        ({"size": "127x128"}, "size", "invalid_value"),
        ({"size": "huge"}, "size", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"extra_body": {"seed": -1}}, "seed", "invalid_value"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps", "invalid_value"),
        ({"partial_images": 3}, "partial_images", "unsupported_value"),
        ({"background": "transparent"}, "background", "unsupported_value"),
    ],
)
def test_bad_requests(images: Any, options: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        images.generate(**{"prompt": PROMPT, **options})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_unknown_model(images: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        images.generate(prompt=PROMPT, model="dall-e-3")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "'default'" in caught.value.message


def test_models(models: Any) -> None:
    (listed,) = models.list().data
    assert models.retrieve(listed.id).to_dict() == listed.to_dict()
    assert (listed.id, listed.object, listed.nfe) == ("default", "model", 4)
    with pytest.raises(openai.NotFoundError):
        models.retrieve("gpt-image-1")


def test_request_id_reaches_the_client(images: Any) -> None:
    raw = images.with_raw_response.generate(prompt=PROMPT, extra_headers={"x-request-id": "mine-1"})
    assert raw.request_id == "mine-1"
