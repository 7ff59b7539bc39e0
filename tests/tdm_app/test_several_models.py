"""Several versions of one base behind one address: chosen by `model`, each its own pixels, within a memory budget."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image
from server_process import ServerProcess
from servers import metric, value_of

from tdm_serve import Pipeline
from tdm_serve.engine import Engine

MODELS = ("default", "default-tdm", "default-teacher")
IMAGES = "/v1/images/generations"
SEED = 11
Check = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[str]:
    """A real server of three versions, each of whose adapters would fit the budget alone, but not both."""
    flags = [flag for model in MODELS for flag in ("--model", model)]
    budget = str(max(2, round(1.5 * adapter_mb())))
    with (tmp_path_factory.mktemp("several") / "log").open("w+") as log:
        process = ServerProcess(log, environment, "--no-page", "--memory-mb", budget, *flags)
        try:
            process.wait_ready()
            yield process.url
        finally:
            assert process.stop() == 0
            assert "Traceback" not in process.errors()


def adapter_mb() -> float:
    """What one version's own weights take, beside the base."""
    return Engine.load(MODELS, device="cpu").versions.stats().bytes / 2 / 2**20


def made(url: str, model: str | None, **body: Any) -> dict[str, Any]:
    asked = {"prompt": "two red circles", "seed": SEED, **body} | ({"model": model} if model else {})
    answer = httpx.post(url + IMAGES, json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pixels(answer: dict[str, Any]) -> bytes:
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as picture:
        return picture.tobytes()


def recipe(answer: dict[str, Any]) -> dict[str, Any]:
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as picture:
        return json.loads(picture.info["tdm-serve"])


def together(url: str, models: Sequence[str], **body: Any) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(models)) as pool:
        return [future.result() for future in [pool.submit(made, url, model, **body) for model in models]]


def test_each_is_listed_and_chosen_by_its_name(url: str, assert_error: Check) -> None:
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == list(MODELS)
    assert len({card["checkpoint_hash"] for card in cards}) == 3
    capabilities = httpx.get(f"{url}/v1/capabilities").json()
    assert capabilities["models"] == list(MODELS)
    assert set(capabilities["shapes"][0]["predicted_ms"]) == {"default", "default-tdm"}  # the teacher is guided
    for card in cards:
        answer = made(url, card["id"])
        assert (answer["model"], answer["data"][0]["nfe"]) == (card["id"], card["nfe"])
        assert recipe(answer)["checkpoint_hash"] == card["checkpoint_hash"]
    assert made(url, None)["model"] == "default"
    unknown = httpx.post(url + IMAGES, json={"prompt": "a star", "model": "default-none"})
    said = assert_error(unknown, 404, "model_not_found", "model")["message"]
    assert "'default', 'default-tdm', 'default-teacher'" in said
    assert_error(httpx.get(f"{url}/v1/models/default-none"), 404, "model_not_found", "model")
    job = httpx.post(f"{url}/v1/jobs", json={"prompt": "a star", "model": "default-none"})
    assert_error(job, 404, "model_not_found", "model")


def test_a_mixed_batch_has_the_pixels_of_each_alone(url: str) -> None:
    alone = {model: pixels(made(url, model)) for model in MODELS}
    assert len(set(alone.values())) == 3
    asked = [*MODELS, *MODELS[:2], *MODELS[:2], "default"]
    for answer in together(url, asked):
        assert pixels(answer) == alone[answer["model"]]
    for model in MODELS[:2]:  # and of a server that has no other version
        [picture] = Pipeline.from_pretrained(model, device="cpu")("two red circles", seed=SEED)
        assert picture.image.tobytes() == alone[model]


def test_what_does_not_fit_the_budget_is_unloaded_and_comes_back(url: str) -> None:
    before = metric(url, "tdm_serve:model_loads_total"), metric(url, "tdm_serve:model_unloads_total")
    for model in ("default", "default-tdm", "default"):
        made(url, model)
        text = httpx.get(f"{url}/metrics").text
        held = [name for name in MODELS[:2] if value_of(text, f'tdm_serve:model_memory_bytes{{model="{name}"}}')]
        assert held == [model]
    assert metric(url, "tdm_serve:model_loads_total") >= before[0] + 2
    assert metric(url, "tdm_serve:model_unloads_total") >= before[1] + 2


@pytest.mark.slow
def test_adapters_that_are_kept_apart_draw_the_same(start_server: Callable[..., ServerProcess], url: str) -> None:
    server = start_server("--no-page", "--adapters", "separate", "--model", "default,default-tdm")
    server.wait_ready()
    for model in MODELS[:2]:
        ours, theirs = pixels(made(server.url, model)), pixels(made(url, model))
        assert len(ours) == len(theirs)
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        assert difference <= 8, "another order of sums, not another picture"
    small, large = metric(server.url, "tdm_serve:model_memory_bytes"), metric(url, "tdm_serve:model_memory_bytes")
    assert 0 < small < 2 * large
    assert pixels(together(server.url, MODELS[:2])[1]) == pixels(made(server.url, "default-tdm"))
