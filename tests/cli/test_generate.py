"""`tdm-serve generate` as a user runs it: a process, files, and the JSON line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Cli = Callable[..., subprocess.CompletedProcess[str]]

PROMPTS = ["two red circles", "a blue ring left of a star"]


@pytest.fixture(scope="module")
def one(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One picture and its JSON."""
    folder = tmp_path_factory.mktemp("one")
    done = cli("generate", PROMPTS[0], "--seed", "7", "-o", "circles.png", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar, no warning: stderr is no terminal
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_json_tells_what_was_made(one: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = one
    assert answer["path"] == "circles.png"
    assert (folder / answer["path"]).is_file()
    assert answer["seed"] == 7
    assert answer["nfe"] == 4
    assert answer["ms"] > 0
    assert answer["model"] == "default"
    assert len(answer["sigmas"]) == 4
    assert answer["images"] == [{key: value for key, value in answer.items() if key != "images"}]


def test_png_carries_its_recipe(one: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = one
    with Image.open(folder / answer["path"]) as picture:
        picture.load()
        assert picture.size == (answer["width"], answer["height"])
        assert picture.text["prompt"] == PROMPTS[0]  # type: ignore[attr-defined]
        assert picture.text["seed"] == "7"  # type: ignore[attr-defined]
        recipe = json.loads(picture.text["tdm-serve"])  # type: ignore[attr-defined]
    assert recipe["checkpoint_hash"] == answer["checkpoint_hash"]
    assert recipe["sigmas"] == answer["sigmas"]


def test_several_prompts_and_the_same_pixels_in_company(
    one: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    done = cli("generate", *PROMPTS, "-n", "2", "--seed", "7", "-o", "many", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert [(image["prompt"], image["seed"]) for image in answer["images"]] == [
        (prompt, 7 + 2 * index + more) for index, prompt in enumerate(PROMPTS) for more in (0, 1)
    ]
    assert {Path(image["path"]) for image in answer["images"]} == {
        path.relative_to(tmp_path) for path in (tmp_path / "many").iterdir()
    }
    assert answer["path"] == answer["images"][0]["path"]
    with Image.open(one[0] / "circles.png") as alone, Image.open(tmp_path / answer["path"]) as together:
        assert alone.tobytes() == together.tobytes()


def test_unusual_settings_are_in_the_recipe(cli: Cli, tmp_path: Path) -> None:
    """Z-Image's guidance scale of 1 is the weight 2; nothing else of these has an entry in an ordinary recipe."""
    options = ["--steps", "3", "--allow-untrained-schedule", "--guidance-scale", "1", "--adapter-scale", "0.5"]
    long = "a red star left of a blue ring " * 20
    done = cli("generate", long, *options, "--truncate-prompt", "--seed", "7", "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" ms, untrained schedule, prompt cut\n")
    with Image.open(tmp_path / "a.png") as picture:
        recipe = json.loads(picture.info["tdm-serve"])
    expected = {"nfe": 6, "guidance": 2.0, "untrained_schedule": True, "truncated": True, "adapter_scale": 0.5}
    assert {name: recipe[name] for name in expected} == expected


def test_default_names_spare_other_files(cli: Cli, tmp_path: Path) -> None:
    taken = tmp_path / "two-red-circles-7.png"
    taken.write_bytes(b"mine")
    done = cli("generate", PROMPTS[0], "--seed", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("two-red-circles-7-2.png  seed 7, 4 NFE, ")
    assert taken.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], ["no-such-model", "default"]),
        (["--model", "."], ["."]),
        (["--size", "100x128"], ["100"]),
        (["--size", "65536x65536"], ["65536"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--dtype", "int3"], ["int3", "float32"]),
        (["--backend", "steam"], ["steam", "eager"]),
        (["--steps", "8"], ["steps is 8", "trained for 4", "--allow-untrained-schedule"]),
        (["--guidance", "1"], ["unrecognized", "--guidance"]),
        (["--guidance-scale", "31"], ["31", "between 0 and 30", "0 turns it off"]),
        (["--adapter-scale", "10.5"], ["10.5", "between 0, the base, and 10"]),
        (["--adapter-scale", "0.5", "--model", "default-teacher"], ["0.5", "default-teacher has no adapter"]),
    ],
    ids=" ".join,
)
def test_bad_input_writes_nothing(arguments: list[str], words: list[str], refused: Callable[[list[str]], str]) -> None:
    complaint = refused(["generate", PROMPTS[0], *arguments])
    for word in words:
        assert word in complaint


def test_overlong_prompt_is_refused(refused: Callable[[list[str]], str]) -> None:
    assert "reads at most 64" in refused(["generate", "a star", "red circle " * 2000])
