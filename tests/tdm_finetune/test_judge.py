"""The second judge: right on true and wrong pictures it never saw, and independent of the checker it watches."""

from __future__ import annotations

import ast
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from tdm_finetune import judge, scenes
from tdm_finetune.judge import data, reading, sprites, train
from tdm_finetune.judge.accuracy import SOFTENED, TRUE, cases, measure, wrong
from tdm_finetune.judge.net import Detector, Found
from tdm_finetune.judge.sprites import KINDS, OTHER, PAINTS, UNSURE
from tdm_finetune.judge.train import ACCURACY_FILE, JudgeConfig
from tdm_finetune.judge.verdict import DETECTOR_FILE, WEIGHTS, bearing, shows_things, shows_word
from tdm_finetune.scenes import Spec, Thing
from tdm_finetune.scenes.world import OPPOSITE, RELATIONS
from tdm_serve.errors import BackendUnavailable, CheckpointError

needs_tesseract = pytest.mark.skipif(not reading.available(), reason=reading.HINT)
STAR, RING = Found("star", "red", 30, 40), Found("ring", "blue", 90, 50)


def render(spec: Spec, seed: int = 0) -> NDArray[np.uint8]:
    return scenes.render(spec, random.Random(seed), allow_held_out=True)


# --- how often it is right ---


@needs_tesseract
def test_the_shipped_judge_is_right_on_fresh_pictures() -> None:
    found = measure(judge.shipped(), 6, seed=4711)
    assert found["accept_true"]["all"] >= 0.95
    assert found["accept_softened"]["all"] >= 0.9
    assert found["reject_wrong"]["all"] >= 0.95


def test_the_committed_accuracy_meets_the_bar_and_is_about_pictures_not_trained_on() -> None:
    found = json.loads((WEIGHTS / ACCURACY_FILE).read_text())
    assert found["split"] == "heldout"
    assert found["accept_true"].keys() == {*scenes.CATEGORIES, "all"}
    assert found["reject_wrong"].keys() == {"colour", "count", "side", "shape", "letter", "all"}
    assert min(found["accept_true"]["all"], found["reject_wrong"]["all"]) >= 0.95


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: ndimage.gaussian_filter(x.astype(np.float32), (5, 5, 0)).astype(np.uint8),
        lambda x: np.full_like(x, 30),
        lambda x: np.random.default_rng(0).integers(0, 255, x.shape, dtype=np.uint8),
        lambda x: np.where(np.arange(128)[:, None, None] < 64, x, x[0, 0]),
    ],
    ids=["blur", "blank", "noise", "lower half lost"],
)
def test_ruined_pictures_are_rejected(damage: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    spec = Spec("attribution", (Thing("star", "red"), Thing("square", "blue")))
    pictures = [render(spec, seed) for seed in range(4)]
    assert judge.verdicts(pictures, [spec] * 4) == [1] * 4
    assert judge.verdicts([damage(picture) for picture in pictures], [spec] * 4) == [0] * 4


@needs_tesseract
def test_a_batch_is_judged_as_its_pictures_are_one_by_one() -> None:
    chosen = list(cases(1, seed=2))[::3]
    assert any(case.spec.word for case in chosen)
    together = judge.verdicts([case.picture for case in chosen], [case.spec for case in chosen])
    assert together == [judge.verdict(case.picture, case.spec) for case in chosen]
    assert 0 < sum(together) < len(together)


def test_wrong_pictures_are_wrong() -> None:
    """The exact checker agrees with what `cases` says of its pictures."""
    for case in cases(3, seed=1):
        assert scenes.check(case.picture, case.spec).strict == (case.nature in (TRUE, SOFTENED)), case
    for prompt in islice(scenes.prompts("val"), 70):
        ways = wrong(prompt.spec, random.Random(0)).keys()
        assert ways >= ({"colour", "letter"} if prompt.spec.word else {"shape", "count"})
        assert ("side" in ways) == (prompt.spec.relation is not None)


# --- what it holds against what was asked ---


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations(relation: str) -> None:
    places = {"left of": (20, 66), "right of": (100, 60), "above": (58, 20), "below": (70, 100)}
    x, y = places[relation]
    middle = Found("ring", "blue", 64, 64)
    moved = replace(STAR, x=x, y=y)
    spec = Spec("position", (Thing("star"), Thing("ring")), relation=relation)
    assert bearing(moved, middle) == relation and bearing(middle, moved) == OPPOSITE[relation]
    for other in RELATIONS:
        for found in ([moved, middle], [middle, moved]):
            assert shows_things(found, replace(spec, relation=other)) == (other == relation)


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ([STAR, RING], True),
        ([RING, STAR], True),
        ([STAR], False),
        ([STAR, RING, RING], False),
        ([STAR, STAR], False),
        ([STAR, replace(RING, colour="green")], False),
        ([replace(STAR, colour="blue"), replace(RING, colour="red")], False),
        ([STAR, replace(RING, kind="other")], False),
        ([], False),
    ],
)
def test_pairs(found: Sequence[Found], right: bool) -> None:
    spec = Spec("attribution", (Thing("star", "red"), Thing("ring", "blue")))
    assert shows_things(found, spec) == right


def test_counts_and_open_colours() -> None:
    two = Spec("counting", (Thing("star"),), count=2)
    green = replace(STAR, colour="green")
    assert shows_things([STAR, green], two)
    assert not shows_things([STAR], two) and not shows_things([STAR, STAR, STAR], two)
    assert not shows_things([STAR, replace(STAR, colour="mixed")], two)
    red = Spec("counting", (Thing("star", "red"),), count=2)
    assert shows_things([STAR, STAR], red) and not shows_things([STAR, green], red)


def test_words_need_the_reading_and_the_letters() -> None:
    spec = Spec("text", word="AB", colour="red")
    a, b = Found("letter", "red", 40, 64), Found("letter", "red", 80, 64)
    assert shows_word([a, b], "AB", spec)
    assert not shows_word([a, b], "AC", spec)
    assert not shows_word([a], "AB", spec)
    assert not shows_word([a, b, STAR], "AB", spec)
    assert not shows_word([a, replace(b, colour="blue")], "AB", spec)


def test_it_shares_no_code_with_the_checker() -> None:
    """Only the parts that draw training data and test pictures may know the world, and none knows its checker."""
    folder = Path(judge.__file__).parent
    for path in folder.glob("*.py"):
        names = set[str]()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdm_finetune.scenes"):
                assert node.module in {f"tdm_finetune.scenes.{name}" for name in ("render", "world", "prompts")}, path
                names |= {alias.name for alias in node.names}
        if path.stem in ("net", "reading", "verdict", "train", "__init__"):
            assert names <= {"Pixels", "Spec", "Thing"}, path  # types only


# --- reading ---


@needs_tesseract
def test_reading_words_of_every_length_and_none() -> None:
    words = ("A", "Q", "HJ", "FOX", "BUM")
    pictures = [render(Spec("text", word=word, colour="cyan")) for word in words]
    blank = np.full_like(pictures[0], 30)
    assert reading.read([*pictures, blank]) == [*words, ""]
    assert reading.read([]) == [] and reading.read([blank]) == [""]


def test_without_tesseract_only_words_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    shape, word = Spec("colours", (Thing("star", "red"),)), Spec("text", word="A", colour="red")
    second = judge.shipped()
    assert second.missing([shape]) is None
    assert "apt-get install tesseract-ocr" in str(second.missing([shape, word]))
    assert second.verdict(render(shape), shape) == 1
    with pytest.raises(BackendUnavailable, match="tesseract is not installed"):
        second.verdict(render(word), word)
    assert reading.version() is None


def test_a_tesseract_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tesseract"
    program.write_text("#!/bin/sh\necho 'no eng.traineddata' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"said: no eng.traineddata"):
        reading.read([render(Spec("text", word="A", colour="red"))])


# --- weights and bad input ---


def test_weights_are_small_and_name_no_machine() -> None:
    assert (WEIGHTS / DETECTOR_FILE).stat().st_size <= 600_000
    assert sum(parameter.numel() for parameter in judge.shipped().detector.parameters()) <= 300_000
    config = json.loads((WEIGHTS / "config.json").read_text())["config"]
    assert config["run"] == "runs/judge"
    log = [json.loads(line) for line in (WEIGHTS / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == config["steps"] and log[-1]["kind"] < log[0]["kind"]


def test_broken_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no detector"):
        judge.Judge.load(tmp_path)
    (tmp_path / DETECTOR_FILE).write_bytes((WEIGHTS / DETECTOR_FILE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="holds no detector"):
        judge.Judge.load(tmp_path)


def test_wrong_arguments() -> None:
    spec = Spec("one_object", (Thing("star"),))
    with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
        judge.verdict(np.zeros((64, 64, 3), dtype=np.uint8), spec)
    with pytest.raises(ValueError, match="float32"):
        judge.verdict(np.zeros((128, 128, 3), dtype=np.float32), spec)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="1 pictures and 2 specs"):
        judge.verdicts([render(spec)], [spec, spec])
    assert judge.verdicts([], []) == []


# --- training data ---


def test_training_pictures_repeat() -> None:
    first, again, next_ = (data.batch(3, 0, step) for step in (5, 5, 6))
    assert torch.equal(first.pictures, again.pictures) and torch.equal(first.kind, again.kind)
    assert not torch.equal(first.pictures, next_.pictures)
    assert first.pictures.shape == (3, 3, 128, 128) and first.pictures.abs().max() <= 1


def test_targets_of_two_objects() -> None:
    """Centres at (12, 12), the middle of cell (1, 1), and at (63, 100), on the right border of cell (12, 7)."""
    present, kind, colour, offset = data.targets([[data.Label(12, 12, 2, 5), data.Label(63, 100, 7, UNSURE)], []])
    assert present[0].nonzero().tolist() == [[1, 1], [12, 7]]
    assert present[1].sum() == 0 and (kind[1] == UNSURE).all()
    assert (kind[0, 1, 1], colour[0, 1, 1]) == (2, 5) and offset[0, :, 1, 1].tolist() == [0.0, 0.0]
    assert kind[0, 12, 7:9].tolist() == [7, 7] and (colour[0, 12, 7:9] == UNSURE).all()
    assert offset[0, :, 12, 7].tolist() == [0.375, 0.0]  # 63 is 3 px right of the cell's middle at 60
    assert offset[0, :, 12, 8].tolist() == [-0.625, 0.0]
    assert offset[0, 0].isnan().sum() == 256 - (offset[0, 0].isfinite()).sum() > 200


def test_objects_that_touch_are_no_objects_any_more() -> None:
    rng = np.random.default_rng(0)
    canvas = data.Canvas(rng)
    circle, square = (sprites.draw_shape(rng, shape, 30, 0) for shape in (0, 1))
    canvas.paste(circle, 10, 10)
    canvas.paste(square, 80, 80)
    assert [label.kind for label in canvas.labels] == [0, 1]
    canvas.paste(circle, 65, 75)
    assert [label.kind for label in canvas.labels] == [0, OTHER, OTHER]


def test_damage_changes_the_name_by_degrees() -> None:
    rng = np.random.default_rng(1)
    whole = sprites.draw_shape(rng, 0, 40, 0)
    hurt = [sprites.damaged(rng, whole) for _ in range(300)]
    assert {sprite.kind for sprite in hurt} == {0, OTHER, UNSURE}
    assert {PAINTS[sprite.colour] for sprite in hurt if sprite.colour != UNSURE} == {"red", "mixed"}
    assert all(sprite.mask.min() >= 0 and sprite.mask.max() <= 1.01 and sprite.mask.sum() > 100 for sprite in hurt)
    letter = sprites.draw_letter(rng, 3)
    assert OTHER not in {sprites.bite(rng, letter).kind for _ in range(50)}  # an E without a bar is an F


# --- the trainer ---


def small(folder: Path, **changes: int) -> JudgeConfig:
    return JudgeConfig(run=folder, steps=4, batch=2, width=8, save_every=2, warmup=1, accuracy_prompts=1, **changes)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(size: int, seed: int, step: int) -> data.Batch:
        if step == 3:
            raise KeyboardInterrupt
        return data.batch(size, seed, step)

    train.train(small(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "batch", stops)
        with pytest.raises(KeyboardInterrupt):
            train.train(small(tmp_path / "halted"))
    assert not (tmp_path / "halted" / DETECTOR_FILE).exists()
    train.train(small(tmp_path / "halted"))
    first, second = ((tmp_path / name / DETECTOR_FILE).read_bytes() for name in ("whole", "halted"))
    assert first == second
    assert (tmp_path / "whole" / ACCURACY_FILE).exists()


def test_a_few_steps_teach_something(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = Detector(KINDS, PAINTS, 16)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-2)
    examples = data.batch(8, 0, 0)
    losses: list[float] = []
    for _ in range(8):
        terms = train.loss_terms(detector(examples.pictures), examples)
        loss = sum(terms.values(), torch.zeros(()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_saved_detector_is_the_same(tmp_path: Path) -> None:
    shipped = judge.shipped().detector
    shutil.copy(WEIGHTS / DETECTOR_FILE, tmp_path / "before.safetensors")
    shipped.save(tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    assert shipped.kinds == KINDS and shipped.colours == PAINTS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["JudgeConfig", "steps is 0", "at least 1"]),
        (["--learning-rate", "0"], ["learning_rate is 0.0", "above 0"]),
        (["--config", "none.toml"], ["none.toml"]),
    ],
)
def test_bad_settings(arguments: list[str], words: list[str], refused: Callable[[list[str]], str]) -> None:
    complaint = refused(["finetune", "judge", *arguments])
    for word in words:
        assert word in complaint
