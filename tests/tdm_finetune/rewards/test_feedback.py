"""People's likes: the record, groups that can teach something, and ratings as a reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_finetune.rewards import load_reward
from tdm_finetune.rewards.feedback import Recipe, groups, ratings, read_feedback, record
from tdm_serve.core import GeneratedImage
from tdm_serve.errors import ConfigError, RewardError

LINE: dict[str, Any] = {
    "prompt": "two red circles",
    "seed": 7,
    "model": "default",
    "checkpoint_hash": "abc123",
    "size": "128x96",
    "like": True,
    "time": "2026-11-22T15:04:05Z",
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write({"seed": 1}, {"seed": 2, "like": False})`: a file of records that differ from LINE in these keys."""

    def written(*changes: dict[str, Any]) -> Path:
        path = tmp_path / "feedback.jsonl"
        path.write_text("".join(json.dumps(LINE | change) + "\n" for change in changes))
        return path

    return written


def test_a_line_is_read_whole(write: Write) -> None:
    path = write(
        {},
        {"like": False, "seed": 8},
        {"like": 0.25, "sigmas": [1, 0.9], "guidance": 3, "time": "2026-11-22T15:04:05.5+01:00"},
    )
    path.write_text(path.read_text() + "\n\n")  # blank lines are no records
    first, second, third = read_feedback(path)
    assert first.recipe == Recipe("two red circles", 7, "abc123", 128, 96)
    assert (first.model, first.rating, second.rating, third.rating) == ("default", 1.0, -1.0, 0.25)
    assert third.recipe.sigmas == (1.0, 0.9) and third.recipe.guidance == 3.0
    assert first.time.utcoffset() is not None and third.time.microsecond == 500_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 1.0}, "'seed' is 1.0"),
        ({"seed": True}, "'seed' is True"),
        ({"seed": 2**63}, "'seed' is 9223372036854775808"),
        ({"prompt": " "}, "'prompt' is ' '"),
        ({"model": None}, "'model' is None"),
        ({"size": "128"}, "'size' is '128'"),
        ({"size": "0x128"}, "'size' is '0x128'"),
        ({"size": 128}, "'size' is 128"),
        ({"like": 1.5}, "'like' is 1.5"),
        ({"like": "up"}, "'like' is 'up'"),
        ({"like": None}, "'like' is None"),
        ({"time": "yesterday"}, "'time' is 'yesterday'"),
        ({"time": "2026-11-22T15:04:05"}, "with a zone"),
        ({"time": 1763823845}, "'time' is 1763823845"),
        ({"sigmas": []}, "'sigmas' is []"),
        ({"sigmas": ["a"]}, "'sigmas'"),
        ({"guidance": "high"}, "'guidance' is 'high'"),
        ({"image": "x"}, "'image' is unknown"),
    ],
)
def test_values_that_do_not_fit_name_the_line(write: Write, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_feedback(write({}, {}, change))
    assert "feedback.jsonl, line 3: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("key", list(LINE))
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text(json.dumps({name: value for name, value in LINE.items() if name != key}))
    with pytest.raises(ConfigError, match=rf"line 1: '{key}' is missing"):
        read_feedback(path)


@pytest.mark.parametrize(
    ("line", "said"), [("{", "line 1: "), ("[1]", "it is list"), ('"like"', "it is str"), ("NaN", "float")]
)
def test_lines_that_are_no_records(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=said):
        read_feedback(path)


def test_files_that_are_none(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ConfigError, match="cannot read the feedback file"):
        read_feedback(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the feedback file"):
        read_feedback(tmp_path / "binary.jsonl")
    with pytest.raises(ConfigError, match="has no records"):
        load_reward(f"feedback(path={write()})")


@given(
    st.dictionaries(
        st.sampled_from(list(LINE)), st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.integers())
    )
)
def test_anything_is_a_record_or_a_value_error(changes: dict[str, Any]) -> None:
    try:
        rated = record(LINE | changes)
    except ValueError:
        return
    assert -1 <= rated.rating <= 1


def test_a_pictures_rating_is_the_mean_of_its_records(write: Write) -> None:
    path = write({"like": True}, {"like": 0.5}, {"like": False}, {"seed": 8, "like": 0.5})
    assert list(ratings(read_feedback(path)).values()) == [pytest.approx(1 / 6), 0.5]


def test_groups_share_all_but_the_seed(write: Write) -> None:
    same = [{"seed": seed, "like": seed % 2 == 0} for seed in range(4)]
    others = [
        {"seed": 0, "like": True, **other}
        for other in ({"prompt": "a cross"}, {"checkpoint_hash": "def"}, {"size": "96x128"}, {"guidance": 2.0})
    ]
    found = groups(read_feedback(write(*same, *others)), 2)
    assert len(found) == 1
    assert found[0].prompt == "two red circles" and found[0].model == "default"
    assert [recipe.seed for recipe in found[0].recipes] == [0, 1, 2, 3]
    assert found[0].ratings == (1.0, -1.0, 1.0, -1.0)


def test_groups_that_teach_nothing_are_left_out(write: Write) -> None:
    agreed = [{"prompt": "a", "seed": seed} for seed in range(5)]
    small = [{"prompt": "b", "seed": 0, "like": True}, {"prompt": "b", "seed": 1, "like": False}]
    again = [{"prompt": "c", "seed": 0, "like": True}, {"prompt": "c", "seed": 0, "like": False}] * 3
    records = read_feedback(write(*agreed, *small, *again))
    assert [group.prompt for group in groups(records, 2)] == ["b"]
    assert groups(records, 3) == []
    with pytest.raises(ConfigError, match="at least 2"):
        groups(records, 1)


def test_as_a_reward_it_looks_the_recipe_up(write: Write) -> None:
    path = write({"seed": 0, "like": True}, {"seed": 1, "like": -0.5}, {"seed": 2, "like": False})
    records = read_feedback(path)
    reward = load_reward(f"feedback(path={path})")
    images, prompts = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), ["two red circles"] * 3
    metadata = [records[2].metadata(), LINE | {"seed": 0}, {"recipe": LINE | {"seed": 1}}]
    assert reward(images, prompts, metadata).tolist() == [-1.0, 1.0, -0.5]
    for wrong, said in (({"recipe": LINE | {"seed": 3}}, "has no rating"), ({}, "holds no recipe: KeyError: 'seed'")):
        with pytest.raises(RewardError, match=rf"cannot judge sample 2 .*{said}"):
            reward(images, prompts, [*metadata[:2], wrong])
    with pytest.raises(RewardError, match=r"sample 0 \('another'\).*has no rating"):
        reward(images[:1], ["another"], metadata[:1])


def test_what_a_picture_says_of_itself_makes_a_record() -> None:
    """The service can write a record from `GeneratedImage.recipe` alone."""
    from PIL import Image

    made = GeneratedImage(
        Image.new("RGB", (128, 96)), "two red circles", 7, 128, 96, 4, (1.0, 0.9), 1.0, "default", "abc"
    )
    recipe = made.recipe()
    line = {key: recipe[key] for key in ("prompt", "seed", "model", "checkpoint_hash", "sigmas", "guidance")}
    line |= {"size": f"{made.width}x{made.height}", "like": True, "time": "2026-11-22T15:04:05Z"}
    rated = record(line)
    assert asdict(rated.recipe) == {
        "prompt": "two red circles", "seed": 7, "checkpoint_hash": "abc", "width": 128, "height": 96,
        "sigmas": (1.0, 0.9), "guidance": 1.0,
    }  # fmt: skip
