"""The scene rewards on pictures that are right, half right and wrong, and a judge who is the same everywhere."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from hashlib import blake2b

import numpy as np
import pytest
import torch

from tdm_finetune import scenes
from tdm_finetune.rewards import load_reward
from tdm_finetune.rewards.scenes import Judge
from tdm_finetune.scenes import Spec, Thing
from tdm_serve.errors import ConfigError, RewardError

ASKED = Spec("attribution", (Thing("circle", "red"), Thing("square", "blue")))
COLOUR_WRONG = replace(ASKED, things=(Thing("circle", "red"), Thing("square", "green")))
ONE_MISSING = Spec("colours", (Thing("circle", "red"),))


def shown(*specs: Spec) -> torch.Tensor:
    return torch.from_numpy(np.stack([scenes.render(spec, random.Random(1)) for spec in specs]))


def test_hand_computed_scores() -> None:
    images = shown(ASKED, COLOUR_WRONG, ONE_MISSING)
    prompts, metadata = ["a red circle and a blue square"] * 3, [{"spec": ASKED}] * 3
    # count 1, fit 3/4: (1 + 0.75) / 2. One of two objects: count 1/2, fit 1/2
    torch.testing.assert_close(load_reward("scenes")(images, prompts, metadata), torch.tensor([1.0, 0.875, 0.5]))
    assert load_reward("scenes-strict")(images, prompts, metadata).tolist() == [1.0, 0.0, 0.0]


def test_a_spec_may_be_a_mapping_as_it_comes_over_http() -> None:
    images, prompts = shown(ASKED), ["x"]
    assert load_reward("scenes")(images, prompts, [{"spec": asdict(ASKED)}]).item() == 1.0


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "no scene under 'spec', only nothing"),
        ({"tag": "colors"}, r"only \['tag'\]"),
        ({"spec": "a red circle"}, "no scene"),
        ({"spec": {"category": "cats"}}, "no valid scene under 'spec': category 'cats' is unknown"),
        ({"spec": {"category": "text", "colours": 3}}, "no valid scene"),
    ],
)
def test_metadata_without_a_scene(metadata: dict[str, object], said: str) -> None:
    with pytest.raises(RewardError, match=rf"'scenes' cannot judge sample 1 \('two'\).*{said}"):
        load_reward("scenes")(shown(ASKED, ASKED), ["one", "two"], [{"spec": ASKED}, metadata])


def test_pictures_of_another_size() -> None:
    with pytest.raises(RewardError, match=r"pictures are \(64, 64\); scenes are 128 x 128"):
        load_reward("scenes")(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), ["x"], [{"spec": ASKED}])


def test_the_judge_likes_with_the_probability_of_the_docstring() -> None:
    judge = Judge(threshold=0.9, temperature=0.05, seed=0)
    assert judge.probability(0.9) == 0.5
    assert judge.probability(1.0) == pytest.approx(0.8807970779778823)  # sigmoid(2)
    assert judge.probability(0.0) < 1e-7
    pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
    digest = blake2b(b"0/a prompt/" + bytes(48), digest_size=8).digest()
    assert judge.draw(pixels, "a prompt") == int.from_bytes(digest) / 2**64
    draws = torch.tensor([judge.draw(pixels, str(i)) for i in range(2000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert abs((draws < judge.probability(1.0)).float().mean().item() - 0.88) < 0.03


def test_likes_are_the_same_in_any_company(scenes_of) -> None:
    batch = scenes_of(24)
    reward = load_reward("scenes-likes(threshold=1,temperature=0.1)")  # true pictures: each a fair coin
    together = reward(*batch)
    assert set(together.tolist()) == {0.0, 1.0}
    backwards = reward(batch.images.flip(0), batch.prompts[::-1], batch.metadata[::-1])
    assert torch.equal(backwards.flip(0), together)
    assert torch.equal(load_reward("scenes-likes(threshold=1,temperature=0.1)")(*batch), together)
    assert not torch.equal(load_reward("scenes-likes(threshold=1,temperature=0.1,seed=1)")(*batch), together)


def test_a_judge_needs_a_temperature() -> None:
    with pytest.raises(ConfigError, match=r"temperature is 0\.0; it must be above 0"):
        load_reward("scenes-likes(temperature=0)")
