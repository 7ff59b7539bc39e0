"""File names: what `-o` means, that nothing is overwritten by accident, and that bad paths are found first."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_serve.cli import output
from tdm_serve.errors import OutputError

ONE = [("two red circles", 7)]
THREE = [("two red circles", 7), ("two red circles", 8), ("a star", 7)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _names(target: str | None, pictures: list[output.Picture]) -> list[str]:
    return [path.as_posix() for path in output.plan(target, pictures)]


def test_default_name_comes_from_prompt_and_seed() -> None:
    assert _names(None, ONE) == ["two-red-circles-7.png"]


def test_default_name_avoids_other_files(tmp_path: Path) -> None:
    (tmp_path / "two-red-circles-7.png").touch()
    (tmp_path / "two-red-circles-7-2.png").touch()
    assert _names(None, [*ONE, *ONE]) == ["two-red-circles-7-3.png", "two-red-circles-7-4.png"]


def test_named_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.png").touch()
    assert _names("mine.png", ONE) == ["mine.png"]


def test_named_file_is_numbered_for_several() -> None:
    assert _names("mine.png", THREE) == ["mine-1.png", "mine-2.png", "mine-3.png"]
    assert _names("mine.png", ONE * 10)[0] == "mine-01.png"


@pytest.mark.parametrize("target", ["new", "new/", "there"])
def test_folder_holds_default_names(target: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    folder = target.rstrip("/")
    assert _names(target, THREE) == [
        f"{folder}/two-red-circles-7.png",
        f"{folder}/two-red-circles-8.png",
        f"{folder}/a-star-7.png",
    ]
    assert not (tmp_path / "new").exists()


def test_fields() -> None:
    assert _names("{index:02}-{slug}-{seed}.png", THREE)[1:] == ["02-two-red-circles-8.png", "03-a-star-7.png"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("a.jpg", "ending in .png"),
        ("missing/a.png", "no folder missing"),
        ("missing/new/", "no folder missing"),
        ("file/a.png", "no folder file"),
        ("file", "ending in .png"),
        ("{seed}.png", "same name 7.png"),
        ("{prompt}.png", "allowed fields: {index}, {seed}, {slug}"),
        ("{index.png", "allowed fields"),
        ("a" * 300 + ".png", "File name too long"),
        ("folder.png/{index}.png", "no folder folder.png"),
    ],
)
def test_bad_targets(target: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        output.plan(target, THREE)
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_read_only_place_is_found_before_the_work() -> None:
    for place in ("/proc", "/sys"):
        if Path(place).is_dir():
            with pytest.raises(OutputError, match=place):
                output.plan(f"{place}/a.png", ONE)


@given(st.text())
def test_slug_is_always_a_short_plain_name(prompt: str) -> None:
    name = output.slug(prompt)
    assert 1 <= len(name.encode("utf-8", "surrogatepass")) <= 2 * output.MAX_SLUG
    assert not set(name) & set("/\\:\0. \n")
    assert not name.startswith("-")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ('the word "CAT" in red', "the-word-cat-in-red"),
        ("два красных круга", "два-красных-круга"),
        ("../../etc/passwd", "etc-passwd"),
        ("🙂", "picture"),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert output.slug(prompt) == name
