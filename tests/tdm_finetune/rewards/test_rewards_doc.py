"""docs/rewards.md says what is there: its table, its examples, its schema."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdm_finetune.rewards import GROUP, load_reward, remote, wire
from tdm_finetune.rewards.feedback import OPTIONAL, REQUIRED, record
from tdm_finetune.rewards.options import parse


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs" / "rewards.md").read_text()


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_the_table_lists_the_built_ins(text: str, root: Path) -> None:
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    named = first_column(section(text, "Built in"))
    assert sorted(named) == sorted(points) and len(named) == len(set(named))


def test_rewards_in_examples_are_built_in(text: str) -> None:
    named = first_column(section(text, "Built in"))
    written = re.findall(r'--reward "([^"]+)"', text)
    assert len(written) >= 4
    assert {part.name for example in written for part in parse(example)} <= set(named)


def test_your_own_works_as_written(text: str, install: Callable[[str], None]) -> None:
    own = section(text, "Your own, in ten lines")
    (code,), (table,) = blocks(own, "python"), blocks(own, "toml")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert tomllib.loads(table)["project"]["entry-points"] == {GROUP: {"brightness": "your_package.module:brightness"}}
    install(code)
    (example,) = re.findall(r"Then `([^`]+)` works", own)
    white = torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    assert load_reward(example)(white, ["a", "b"], [{}, {}]).tolist() == [1.0, 1.0]


def test_the_http_schema_is_the_one_in_use(text: str) -> None:
    request, answer, error = map(json.loads, blocks(section(text, "A reward behind HTTP"), "json"))
    sent = json.loads(wire.pack_request("json", torch.zeros(1, 4, 4, 3, dtype=torch.uint8), ["a"], [{"b": 1}]))
    assert list(request) == list(sent) and request["images"][0][:8] == sent["images"][0][:8]
    assert list(answer) == ["scores"] and list(error) == ["error"]
    assert all(str(status) in text for status in remote.PASSING)


def test_the_feedback_record_is_the_one_that_is_read(text: str) -> None:
    likes = section(text, "People's likes")
    (line,) = blocks(likes, "json")
    assert record(json.loads(line)).rating == 1.0
    assert first_column(likes) == [*REQUIRED, *OPTIONAL]
    assert list(json.loads(line)) == list(REQUIRED)
