"""What the page is made of; no browser needed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tdm_app.online.groups import Groups, count_groups
from tdm_app.page import figures, making, words
from tdm_app.page.boxes import check_limits, requests_of, size_choices, versus
from tdm_app.page.keep import MAX_HISTORY, MAX_TABS, Tab, Tabs, slug
from tdm_app.page.suggestions import suggestion
from tdm_app.settings import Settings
from tdm_finetune.rewards.feedback import groups, record
from tdm_serve import GeneratedImage, Pipeline
from tdm_serve.core import Progress
from tdm_serve.errors import Cancelled, DeadlineUnreachable, InvalidRequest, OutputError, Overloaded


def test_size_choices(pipeline: Pipeline) -> None:
    names, sizes = zip(*size_choices(pipeline.info), strict=True)
    assert sizes[0] == f"{pipeline.info.width}x{pipeline.info.height}"
    assert names[0] == "Square · 128 by 128"
    assert len(sizes) == len(set(sizes)) == 5
    for size in sizes:
        for request in requests_of("a red circle", "", size, 1):
            pipeline.check(request)


def test_size_choices_stay_within_a_models_limits(pipeline: Pipeline) -> None:
    square_only = replace(pipeline.info, min_side=pipeline.info.width, max_side=pipeline.info.width)
    assert [size for _, size in size_choices(square_only)] == [f"{pipeline.info.width}x{pipeline.info.height}"]


def test_requests_of_the_boxes() -> None:
    made = requests_of("a red circle", " 5 ", "128x96", 2, "default")
    assert [(one.seed, one.width, one.height, one.model) for one in made] == [
        (5, 128, 96, "default"),
        (6, 128, 96, "default"),
    ]
    for bad, param in ((("", "x", "128x128", 1), "seed"), (("", "", "big", 1), "size"), (("", "", "128x128", 5), "n")):
        with pytest.raises(InvalidRequest) as caught:
            requests_of(*bad)
        assert caught.value.param == param


def test_versus_gives_every_model_the_same_noise() -> None:
    made = versus("a red circle", "", "128x128", ["a", "b"])
    assert [one.model for one in made] == ["a", "b"]
    assert replace(made[0], model="") == replace(made[1], model="")


def test_the_servers_limits_hold_for_the_page() -> None:
    settings = Settings(max_prompt_chars=10, max_pixels=128 * 128)
    check_limits(requests_of("a star", "1", "128x128", 1), settings)
    with pytest.raises(InvalidRequest, match=r"the prompt has 11 characters; allowed here: at most 10"):
        check_limits(requests_of("a" * 11, "1", "128x128", 1), settings)
    with pytest.raises(InvalidRequest, match=r"size 128x144 has 18432 pixels; allowed here: at most 16384"):
        check_limits(requests_of("a star", "1", "128x144", 1), settings)


def test_caption_and_table(pipeline: Pipeline) -> None:
    pictures = pipeline("a red circle", seed=9, n=2)
    assert re.fullmatch(r"seed 9 · 4 NFE · \d+ ms", words.caption(pictures[0]))
    lines = words.table(pictures).splitlines()
    assert lines[0] == "| picture | seed | NFE | text ms | denoise ms | decode ms | total ms |"
    assert re.match(r"\| 2 \| 10 \| 4 \| \d", lines[3])


@pytest.mark.parametrize(
    ("error", "said"),
    [(Overloaded("the queue is full", 3200), "The server is busy: the queue is full. Please try again in 4 s."),
     (DeadlineUnreachable("too late", 5), "That did not work: too late."),
     (Cancelled("called off"), "Cancelled."),
     (OutputError("cannot write /secret"), "That did not work: the service cannot write its state; its log says why."),
     (ZeroDivisionError("secret"), f"That did not work: {words.BROKEN}."),
     (InvalidRequest("it is '<b>'; allowed: 1"), "That did not work: it is &#39;&lt;b&gt;&#39;; allowed: 1.")],
)  # fmt: skip
def test_trouble_is_one_sentence(error: Exception, said: str) -> None:
    assert words.trouble(error) == said


@pytest.mark.parametrize(
    ("ms", "said"), [(0, "0.1 s"), (101, "0.2 s"), (940, "1.0 s"), (951, "1 s"), (1001, "2 s"), (100_000, "2 min")]
)
def test_times_for_people(ms: float, said: str) -> None:
    assert words.seconds(ms) == said


def test_progress_in_words() -> None:
    assert words.progress(0, 0, 3, 1500) == "3 pictures ahead · about 2 s left"
    assert words.progress(0, 0, 0, 1500) == "Starting · about 2 s left"
    assert words.progress(2, 8, 0, 0) == "2 of 8 evaluations · almost there"


@given(st.text())
def test_nothing_typed_becomes_markup(text: str) -> None:
    safe = words.safe(text)
    assert not set(safe) & set("<>\"'`*_\n\r")
    assert re.fullmatch(r"(?:[^&]|&(?:amp|lt|gt|#\d+);)*", safe)


def test_a_strip_has_the_first_and_the_last_frame() -> None:
    assert figures.thinned(["a", "b"]) == ["a", "b"]
    frames = figures.thinned([str(number) for number in range(50)])
    assert (len(frames), frames[0], frames[-1]) == (figures.SHOWN_IN_STRIP, "0", "49")


def test_files_and_history_of_a_tab(pipeline: Pipeline, tmp_path: Path) -> None:
    (picture,) = pipeline("two red circles", seed=3)
    tab = Tab(tmp_path / "tab")
    kept = tab.keep(picture, (), None)
    assert kept.png.read_bytes() == picture.png()
    assert json.loads(kept.recipe.read_text()) == picture.recipe()
    assert kept.png.name == "two-red-circles-3-default.png"
    tab.remember([kept])
    for _ in range(MAX_HISTORY):
        tab.remember([tab.keep(picture, (), None)])
    assert len(tab.history) == MAX_HISTORY
    assert not kept.png.exists()
    tab.close()
    assert not (tmp_path / "tab").exists()


def test_a_picture_on_show_keeps_its_files(pipeline: Pipeline, tmp_path: Path) -> None:
    (picture,) = pipeline("two red circles", seed=3)
    tab = Tab(tmp_path / "tab")
    tab.shown["here"] = kept = tab.keep(picture, (), None)
    tab.remember([kept])
    tab.remember([tab.keep(picture, (), None) for _ in range(MAX_HISTORY)])
    assert kept.png.exists()


def test_tabs_that_never_say_goodbye_make_room(tmp_path: Path) -> None:
    tabs = Tabs(lambda: tmp_path)
    first = tabs.of("first")
    first.folder.mkdir()
    for number in range(MAX_TABS):
        tabs.of(str(number))
    assert len(tabs) == MAX_TABS
    assert not first.folder.exists()
    assert tabs.of("0") is tabs.of("0")
    tabs.close("0")
    assert len(tabs) == MAX_TABS - 1


@pytest.mark.parametrize(
    ("text", "name"),
    [("Two <RED> circles!", "two-red-circles"), ("../../etc", "etc"), ("赤い 円", "赤い-円"), ("?", "picture")],
)
def test_file_names(text: str, name: str) -> None:
    assert slug(text) == name


RECORDS = st.lists(
    st.fixed_dictionaries({
        "prompt": st.sampled_from(["a", "b"]), "seed": st.integers(0, 3), "model": st.just("m"),
        "checkpoint_hash": st.sampled_from(["x", "y"]), "size": st.sampled_from(["64x64", "64x96"]),
        "like": st.booleans(), "time": st.just("2026-01-01T00:00:00Z"), "sigmas": st.just([1.0, 0.5]),
        "guidance": st.sampled_from([None, 1.0]),
    }),
    max_size=20,
)  # fmt: skip


@given(RECORDS)
def test_usable_groups_are_the_trainers(records: list[dict[str, Any]]) -> None:
    found = groups([record(one) for one in records], 2)
    for checkpoint in ("x", "y"):
        mine = sum(group.recipes[0].checkpoint_hash == checkpoint for group in found)
        assert count_groups(records, checkpoint).usable == mine


def test_count_groups() -> None:
    base = {"prompt": "a", "checkpoint_hash": "x", "size": "64x64", "like": True}
    rated = [{**base, "seed": 1}, {**base, "seed": 2, "like": False}, {**base, "seed": 1, "prompt": "b"}]
    assert count_groups(rated, "x") == Groups(pictures=3, groups=2, usable=1)
    assert count_groups(rated, "other") == Groups(0, 0, 0)


def test_suggestions_are_prompts_the_model_reads(pipeline: Pipeline) -> None:
    for prompt in {suggestion() for _ in range(50)}:
        assert not re.search(r"\ba [aeiou]", prompt)
        for request in requests_of(prompt, "1", "128x128", 1):
            pipeline.check(request)


class Slow:
    """Stands where a ticket stands; its news come when the test says so."""

    position, eta_ms = 2, 100.0

    def __init__(self, events: Sequence[Sequence[Progress]], pause_s: float = 0.0) -> None:
        self.events, self.pause_s = events, pause_s

    async def progress(self) -> AsyncIterator[Progress]:
        for together in self.events:
            await asyncio.sleep(self.pause_s)
            for event in together:
                yield event


async def seen(ticket: Any, pictures: int) -> list[making.View]:
    return [view async for view in making.watch(ticket, pictures)]


DOT = Image.new("RGB", (2, 2))


@pytest.mark.anyio
async def test_pictures_of_one_evaluation_come_together() -> None:
    events = [[Progress(0, step, 4, DOT), Progress(1, step, 4, DOT)] for step in (1, 2, 3)]
    views = await seen(Slow(events), 2)
    assert [(view.done, view.total) for view in views] == [(0, 0), (2, 8), (4, 8), (6, 8)]
    assert [len(view.strips[0]) for view in views] == [0, 1, 2, 3]


@pytest.mark.anyio
async def test_of_few_evaluations_none_is_skipped_and_of_many_the_newest_is_shown() -> None:
    few = await seen(Slow([[Progress(0, step, 4) for step in (1, 2, 3, 4)]]), 1)
    assert [view.done for view in few] == [0, 1, 2, 3, 4]
    many = await seen(Slow([[Progress(0, step, 50, DOT) for step in range(1, 51)]]), 1)
    assert [view.done for view in many] == [0, 50]
    assert len(many[-1].strips[0]) == 50


@pytest.mark.anyio
async def test_silence_renews_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "TICK_S", 0.02)
    views = await seen(Slow([[Progress(0, 1, 4)]], pause_s=0.1), 1)
    assert len(views) > 3
    assert views[1].ahead == 2


def test_everything_a_picture_says_is_there(pipeline: Pipeline, tmp_path: Path) -> None:
    picture: GeneratedImage = pipeline('the word "A" in red', seed=1)[0]
    kept = Tab(tmp_path).keep(picture, ("data:1", "data:2"), None)
    html = figures.finished(kept)
    assert html.count("<img") == 1 + 3
    assert f'download="{kept.png.name}"' in html
    assert "\n" not in html
