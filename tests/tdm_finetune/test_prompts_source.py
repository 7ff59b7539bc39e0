"""Where prompts come from: files in their own order every time round, the model's world, and what is unusable."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from toy_trainee import ToyTrainee

from tdm_finetune.prompts import read_prompts, stream
from tdm_finetune.trainee import Prompt
from tdm_serve.errors import ConfigError


def take(source: Path | None, count: int, *categories: str, split: str = "train", seed: int = 0) -> list[Prompt]:
    return list(islice(stream(ToyTrainee(), source, categories, split, seed), count))


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red star\n\n  two rings  \r\nein weißer Kreis, größer\n\t\n", encoding="utf-8")
    assert read_prompts(path) == [Prompt(text, {}) for text in ("a red star", "two rings", "ein weißer Kreis, größer")]


def test_a_jsonl_file_keeps_what_rewards_want_to_know(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "a red star", "tag": "colors", "include": [{"class": "star", "count": 1}]}, {"prompt": "b"}]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    assert read_prompts(path) == [Prompt("a red star", records[0]), Prompt("b", records[1])]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", ["empty.txt holds no prompt", "one a line"]),
        ("blank.txt", " \n\t\n\n", ["blank.txt holds no prompt"]),
        ("empty.jsonl", "\n", ["empty.jsonl holds no prompt"]),
        ("bad.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', ["bad.jsonl, line 3", "no JSON object"]),
        ("list.jsonl", '["a"]\n', ["list.jsonl, line 1", '"prompt"']),
        ("number.jsonl", "3\n", ["number.jsonl, line 1", '"prompt"']),
        ("other.jsonl", '{"prompt": "a"}\n{"text": "a"}\n', ["other.jsonl, line 2", "'prompt'"]),
        ("null.jsonl", '{"prompt": null}\n', ["null.jsonl, line 1", "None", "text that is not empty"]),
        ("space.jsonl", '{"prompt": " "}\n', ["space.jsonl, line 1", "' '", "text that is not empty"]),
    ],
)
def test_unusable_files_are_named_with_their_line(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        stream(ToyTrainee(), path, (), "train", 0)  # before anything is drawn
    for word in words:
        assert word in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read: .*No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"cannot be read: .*[Dd]irectory"):
        read_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt cannot be read: .*utf-8"):
        read_prompts(tmp_path / "latin.txt")


def test_every_prompt_comes_once_a_round_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(map(str, range(12))))
    rounds = [[prompt.text for prompt in take(path, 36)][i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(one, key=int) == [str(i) for i in range(12)] for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
    assert take(path, 36) == take(path, 36)  # so that a resumed run can skip what it has had
    assert take(path, 12) != take(path, 12, seed=1)


def test_without_a_file_the_world_asks() -> None:
    assert take(None, 5) == list(islice(ToyTrainee().prompts("train", 0), 5))
    assert take(None, 5, split="val") != take(None, 5)


def test_only_some_categories(tmp_path: Path) -> None:
    assert {prompt.metadata["category"] for prompt in take(None, 40)} == {"bright", "dark", "grey"}
    assert {prompt.metadata["category"] for prompt in take(None, 40, "dark", "grey")} == {"dark", "grey"}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "category": "{"ab"[i % 2]}"}}\n' for i in range(6)))
    assert {prompt.text for prompt in take(path, 9, "b")} == {"1", "3", "5"}


def test_a_category_that_never_occurs_is_told_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="categories bride never occur; the prompts have bright, dark, grey"):
        take(None, 1, "bride")
    (tmp_path / "plain.txt").write_text("a red star")
    with pytest.raises(ConfigError, match="categories colour never occur; the prompts have None"):
        take(tmp_path / "plain.txt", 1, "colour")
