"""The SDK on the embedded checkpoint: determinism, batching, counting, recipes, bad input."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_serve import GeneratedImage, Pipeline, StepEvent
from tdm_serve.errors import InvalidRequest, PromptTooLong, UnknownModel
from tdm_serve.models.families.zimage import KEPT_LEVELS

LONG = 'the word "CAT" in green, so long that it needs more padding, éüß'
PROMPTS = ["two red circles", LONG, "a star", "the letters GO in white"]


def pixels(image: GeneratedImage) -> np.ndarray:
    return np.asarray(image.image)


def test_a_prompt_becomes_a_picture_in_four_evaluations(pipeline: Pipeline) -> None:
    [image] = pipeline("two red circles", seed=7)
    assert image.image.size == (128, 128)
    assert (image.nfe, image.seed, image.prompt) == (4, 7, "two red circles")
    assert image.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert image.checkpoint_hash == pipeline.info.checkpoint_hash
    assert set(image.timings_ms) == {"text", "denoise", "decode", "total"}


def test_a_picture_alone_equals_the_same_in_any_batch(pipeline: Pipeline) -> None:
    together = pipeline(PROMPTS, seed=11)
    assert [image.seed for image in together] == [11, 12, 13, 14]
    for image in together:
        [alone] = pipeline(image.prompt, seed=image.seed)
        assert np.array_equal(pixels(alone), pixels(image))
    backwards = pipeline(PROMPTS[::-1], seed=[14, 13, 12, 11])
    for image, other in zip(together, backwards[::-1], strict=True):
        assert np.array_equal(pixels(image), pixels(other))


@pytest.mark.slow
def test_same_pixels_after_a_restart(pipeline: Pipeline) -> None:
    code = (
        f"import hashlib, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from tdm_serve import Pipeline\n"
        "print(hashlib.sha256(Pipeline.from_pretrained()('a red ring', seed=3)[0].image.tobytes()).hexdigest())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256(pipeline("a red ring", seed=3)[0].image.tobytes()).hexdigest()
    assert answer.stdout.strip() == here


def test_n_counts_seeds_up(pipeline: Pipeline) -> None:
    images = pipeline(["a star", "a ring"], seed=5, n=2)
    assert [(image.prompt, image.seed) for image in images] == [
        ("a star", 5),
        ("a star", 6),
        ("a ring", 7),
        ("a ring", 8),
    ]


def test_a_seed_starts_from_diffusers_latents(pipeline: Pipeline) -> None:
    expected = torch.randn((1, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(9), dtype=torch.float32)
    assert torch.equal(pipeline.engine.model.noise(9, 128, 128), expected)


def test_guidance_costs_two_evaluations_a_step(pipeline: Pipeline) -> None:
    [image] = pipeline("a star", seed=1, steps=3, guidance=2.5, allow_untrained_schedule=True)
    assert image.nfe == 6


def test_the_callback_sees_every_step(pipeline: Pipeline) -> None:
    events: list[StepEvent] = []
    pipeline(["a star", "a ring"], seed=1, callback=events.append)
    assert [(event.index, event.total) for event in events] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(event.clean_latents.shape == (2, 4, 16, 16) for event in events)
    assert [event.sigma for event in events] == pytest.approx([1.0, 0.9, 0.75, 0.5])


def test_one_event_a_step_whatever_the_lengths_of_the_prompts(pipeline: Pipeline) -> None:
    """Prompts of different padded lengths run in forwards of their own, and report together, in order."""
    events: list[StepEvent] = []
    long = "a star " * 18
    prompts = ["a star", long, "a ring"]
    images = pipeline(prompts, seed=1, callback=events.append)
    lengths = [pipeline.engine.model.condition(prompt).shape[1] for prompt in prompts]
    assert lengths == [32, 64, 32]
    assert [(event.index, event.total) for event in events] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    shown = pipeline.engine.model.decode([latents.unsqueeze(0) for latents in events[-1].clean_latents])
    assert all(np.array_equal(pixels(image), picture) for image, picture in zip(images, shown.numpy(), strict=True))


def test_checks_from_other_threads_change_nothing(pipeline: Pipeline) -> None:
    """A server checks requests while its device thread encodes; a tokenizer that remembers padding mixes them up."""
    model = pipeline.engine.model
    prompt = "two red circles"
    expected, tokens = model.condition(prompt), model._tokenised(prompt)
    stop = threading.Event()

    def check() -> None:
        for number in itertools.count():
            if stop.wait(0.001):  # a pause: threads that only spin would starve the one that encodes
                return
            model.check_prompt(f"a star {number}")  # a new one, as tokens of known prompts are kept

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert model._tokenised(prompt) == tokens
            assert torch.equal(model.condition(prompt), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_kept_noise_levels_are_bounded(pipeline: Pipeline) -> None:
    model = pipeline.engine.model
    first = model.modulation(0.3)
    for index in range(KEPT_LEVELS):
        model.modulation((index + 1) / (KEPT_LEVELS + 1))
    assert torch.equal(model.modulation(0.3), first)
    assert len(model._modulation) == KEPT_LEVELS


def test_other_sizes(pipeline: Pipeline) -> None:
    [image] = pipeline("a star", seed=1, size="96x160")
    assert image.image.size == (96, 160)


def test_a_png_carries_its_recipe(pipeline: Pipeline) -> None:
    [image] = pipeline(LONG, seed=2)
    with Image.open(io.BytesIO(image.png())) as opened:
        recipe = json.loads(opened.info["tdm-serve"])
        assert opened.info["prompt"] == LONG
        assert np.array_equal(np.asarray(opened), pixels(image))
    assert recipe == image.recipe()


@pytest.mark.parametrize(
    ("arguments", "param", "sentence"),
    [
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"size": "100x128"}, "size", "multiple of 16 between 64 and 256"),
        ({"size": "512x512"}, "size", "512"),
        ({"size": "wide"}, "size", "'wide'"),
        ({"n": 0}, "n", "between 1 and 10"),
        ({"n": 11}, "n", "11"),
        ({"n": 0, "seed": []}, "n", "between 1 and 10"),
        ({"n": 11, "seed": list(range(11))}, "n", "11"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": [1, 2]}, "seed", "2 seeds"),
        ({"steps": 0}, "steps", "between 1 and 100"),
        ({"guidance": -1.0}, "guidance", "-1"),
    ],
)
def test_bad_requests_name_value_and_range(
    pipeline: Pipeline, arguments: dict[str, object], param: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        pipeline(**({"prompt": "a star", "seed": 1} | arguments))  # pyright: ignore[reportArgumentType]
    assert caught.value.param == param


def test_an_over_long_prompt_is_never_cut(pipeline: Pipeline) -> None:
    with pytest.raises(PromptTooLong, match="reads at most 64"):
        pipeline("a red star and " * 40, seed=1)


def test_characters_that_the_tokenizer_never_saw_work(pipeline: Pipeline) -> None:
    assert pipeline("ein 星 🟣 Þ", seed=1)[0].nfe == 4


def test_unknown_models_list_the_known() -> None:
    with pytest.raises(UnknownModel, match="default-tdm"):
        Pipeline.from_pretrained("no-such-model")
