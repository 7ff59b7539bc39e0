"""Dataclasses as flags and TOML: types, precedence, and errors that name the value."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tdm_serve.config import add_dataclass_arguments, at_least, from_sources, multiple_of, positive
from tdm_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Example:
    """One field of each type."""

    run: Path = Path("runs/example")
    steps: int = 100
    learning_rate: float = 1e-3
    resume: bool = True
    name: str = "a"
    mode: Literal["fast", "exact"] = "fast"
    channels: tuple[int, ...] = (16, 32)
    limit: int | None = None
    floor: float | None = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Needy:
    """A field without a default."""

    source: Path


def build(tmp_path: Path, toml: str | None = None, *flags: str) -> Example:
    file = None
    if toml is not None:
        file = tmp_path / "config.toml"
        file.write_text(toml)
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--other", default=1)  # a command's own argument is not the config's business
    add_dataclass_arguments(parser, Example)
    return from_sources(Example, file, parser.parse_args(flags))


def test_defaults(tmp_path: Path) -> None:
    assert build(tmp_path) == Example()


def test_every_type_from_a_file(tmp_path: Path) -> None:
    text = """
        run = "runs/x"
        steps = 7
        learning_rate = 1
        resume = false
        name = "b"
        mode = "exact"
        channels = [8]
        limit = 3
        floor = 2
    """
    config = build(tmp_path, text)
    assert config == Example(Path("runs/x"), 7, 1.0, False, "b", "exact", (8,), 3, 2.0)
    assert isinstance(config.learning_rate, float)
    assert isinstance(config.floor, float)


def test_every_type_from_flags(tmp_path: Path) -> None:
    flags = "--run runs/x --steps 7 --learning-rate 2e-4 --no-resume --name b --mode exact --channels 8,4 --limit 3"
    config = build(tmp_path, None, *flags.split(), "--floor", "none")
    assert config == Example(Path("runs/x"), 7, 2e-4, False, "b", "exact", (8, 4), 3, None)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = build(tmp_path, 'steps = 7\nname = "file"', "--steps", "8")
    assert (config.steps, config.name) == (8, "file")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("step = 7", ["unknown key 'step'", "did you mean steps"]),
        ("zzz = 7", ["unknown key 'zzz'", "known: run, steps"]),
        ("steps = 7.0", ["steps is 7.0 (float)", "expected int"]),
        ("steps = true", ["steps is True (bool)", "expected int"]),
        ("learning_rate = true", ["expected float"]),
        ('resume = "yes"', ["resume is 'yes' (str)", "expected bool"]),
        ("name = 3", ["expected text"]),
        ("run = 3", ["expected path"]),
        ('mode = "slow"', ["mode is 'slow' (str)", "'fast' or 'exact'"]),
        ("channels = 3", ["expected list of int"]),
        ("channels = [1, 2.5]", ["channels is [1, 2.5] (list)", "expected list of int"]),
        ('limit = "many"', ["limit is 'many' (str)", "expected int or none"]),
        ("steps = 0", ["steps is 0; it must be at least 1"]),
        ("steps = 1\nname = x", ["is not a TOML file", "line 2"]),
    ],
)
def test_bad_files(toml: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, toml)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "many"], "'many' is no int"),
        (["--mode", "slow"], "'slow' is no 'fast' or 'exact'"),
        (["--channels", "8,x"], "'8,x' is no list of int"),
        (["--limit", "x"], "'x' is no int or none"),
    ],
)
def test_bad_flags(flags: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentError, match=words):
        build(tmp_path, None, *flags)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the config file"):
            from_sources(Example, path, argparse.Namespace())


def test_field_without_a_value() -> None:
    with pytest.raises(ConfigError, match="Needy needs a value for source"):
        from_sources(Needy, None, argparse.Namespace())


def test_help_shows_types_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_dataclass_arguments(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "--channels CHANNELS list of int (default: 16,32)" in text
    assert "--resume, --no-resume bool (default: true)" in text
    assert "'fast' or 'exact' (default: fast)" in text
    assert "int or none (default: none)" in text


@dataclass(frozen=True, slots=True)
class Ranges:
    """Every kind of bound."""

    steps: int = 1
    rate: float = 1.0
    width: int = 8

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        positive(self, "rate")
        multiple_of(self, 8, "width")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "at least 1"),
        ("rate", 0.0, "above 0"),
        ("rate", math.nan, "above 0"),
        ("width", 12, "a multiple of 8"),
        ("width", 0, "a multiple of 8"),
        ("width", -8, "a multiple of 8"),
    ],
)
def test_bounds_name_field_value_and_what_is_allowed(field: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be {allowed}"):
        Ranges(**{field: value})  # pyright: ignore[reportArgumentType]


def test_values_on_a_bound_are_allowed() -> None:
    assert Ranges(steps=1, rate=1e-9, width=16).width == 16
