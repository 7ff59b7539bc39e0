"""`tdm-serve eval` on a few prompts, and the scoring under it: the table, the line of JSON, and bad input first."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tdm_finetune import scenes
from tdm_finetune.data import examples
from tdm_finetune.evaluate import evaluate
from tdm_finetune.evaluate_cli import method_of
from tdm_finetune.judge import reading
from tdm_finetune.monitor import diversity, palette_error
from tdm_finetune.scoring import World, score_pictures
from tdm_serve import GeneratedImage, Pipeline, Request
from tdm_serve.core import StepCallback
from tdm_serve.errors import ConfigError, InvalidRequest

Cli = Callable[..., subprocess.CompletedProcess[str]]


class Perfect(Pipeline):
    """The real pipeline with true pictures in place of its own; every other one shows something else if `half`."""

    def __init__(self, pipeline: Pipeline, split: scenes.Split, *, half: bool = False) -> None:
        super().__init__(pipeline.engine)
        self.made: list[int] = []
        self._half = half
        self._truth: Iterator[tuple[scenes.ScenePrompt, np.ndarray]] = examples(0, split)

    def generate(self, requests: Sequence[Request], callback: StepCallback | None = None) -> list[GeneratedImage]:
        self.made.append(len(requests))
        return [self._replaced(image) for image in super().generate(requests, callback)]

    def _replaced(self, image: GeneratedImage) -> GeneratedImage:
        prompt, picture = next(self._truth)
        assert prompt.text == image.prompt
        blank = self._half and image.seed % 2
        pixels = np.full_like(picture, scenes.BACKGROUND) if blank else picture
        return GeneratedImage(
            Image.fromarray(pixels), image.prompt, image.seed, image.width, image.height, image.nfe, image.sigmas,
            image.guidance, image.model, image.checkpoint_hash,
        )  # fmt: skip


def test_true_pictures_score_one(pipeline: Pipeline) -> None:
    perfect = Perfect(pipeline, "heldout")
    evaluation = evaluate(perfect, "heldout", 14, batch=4, repeats=None)
    assert perfect.made == [4, 4, 4, 2]
    assert evaluation.scores() == {"strict": 1.0, "soft": 1.0, "n": 14}
    summary = evaluation.summary()
    assert list(summary["categories"]) == list(scenes.CATEGORIES)
    assert all(scores == {"strict": 1.0, "soft": 1.0, "n": 2} for scores in summary["categories"].values())
    assert summary["nfe"] == 4 and summary["checkpoint_hash"] == pipeline.info.checkpoint_hash


def test_what_no_reward_sees_is_in_the_row(pipeline: Pipeline) -> None:
    """Two prompts of three seeds each for the diversity, from the same run."""
    made: list[tuple[str, int]] = []

    class Watched(Pipeline):
        def generate(self, requests: Sequence[Request], callback: StepCallback | None = None) -> list[GeneratedImage]:
            made.extend((request.prompt, request.seed) for request in requests)
            return super().generate(requests, callback)

    row = evaluate(Watched(pipeline.engine), "val", 3, seed=1, repeats=(2, 3)).summary()
    texts = [prompt.text for prompt in islice(scenes.prompts("val", seed=1), 3)]
    assert made[:3] == [(text, 1 + i) for i, text in enumerate(texts)]
    assert made[3:] == [(text, seed) for text in texts[:2] for seed in (1, 2, 3)]
    assert 0.05 < row["diversity"] < 0.4
    assert 2e-4 < row["palette_error"] < 2e-2
    assert row["threads"] >= 1 and row["compressibility"] > 1


def true_pictures(n: int) -> tuple[list[scenes.ScenePrompt], list[np.ndarray]]:
    found = list(islice(examples(3, "val"), n))
    return [prompt for prompt, _ in found], [picture for _, picture in found]


@pytest.mark.skipif(not reading.available(), reason=reading.HINT)
def test_pictures_are_scored_without_a_pipeline() -> None:
    prompts, pictures = true_pictures(14)
    scores = score_pictures(pictures, prompts, repeats=np.stack([pictures[:3]]))
    row = scores.row(scenes.CATEGORIES)
    assert (row["strict"], row["soft"], row["n"]) == (1.0, 1.0, 14)
    assert row["second_judge"] >= 0.85 and set(row["second_judge_categories"]) == set(scenes.CATEGORIES)
    assert row["palette_error"] == round(palette_error(np.stack(pictures)), 6)
    assert row["diversity"] == round(diversity(np.stack([pictures[:3]])), 5)
    assert row["missing"] == {}
    assert json.loads(json.dumps(row)) == row
    blank = [np.full_like(picture, 30) for picture in pictures]
    assert score_pictures(blank, prompts).second() == 0.0


def test_what_cannot_be_measured_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, pictures = true_pictures(7)
    skipped = score_pictures(pictures, prompts, second_judge=False).row(scenes.CATEGORIES)
    assert skipped["second_judge"] is skipped["second_judge_categories"] is None
    assert skipped["missing"] == {"diversity": "no prompt was repeated", "second_judge": "skipped"}
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "tesseract" in score_pictures(pictures, prompts).missing["second_judge"]
    shapes = [index for index, prompt in enumerate(prompts) if prompt.spec.word is None]
    rest = score_pictures([pictures[i] for i in shapes], [prompts[i] for i in shapes])
    assert "second_judge" not in rest.missing and rest.second() is not None  # needs no Tesseract


def test_another_world_is_scored_by_its_own_rules() -> None:
    """Pictures of another size, a checker of whole batches, another palette, no second judge."""
    spec = SimpleNamespace(category="dark")

    def darkness(pictures: np.ndarray, specs: Sequence[object]) -> list[SimpleNamespace]:
        assert len(pictures) == len(specs)
        means = pictures.mean(axis=(1, 2, 3)) / 255
        return [SimpleNamespace(strict=float(m < 0.1), soft=float(1 - m)) for m in means]

    world = World(darkness, ("dark",), [(0, 0, 0), (255, 255, 255)])
    pictures = np.stack([np.full((16, 16, 3), level, dtype=np.uint8) for level in (0, 255)])
    row = score_pictures(pictures, [SimpleNamespace(spec=spec)] * 2, world=world).row(world.categories)
    assert (row["strict"], row["soft"], row["palette_error"]) == (0.5, 0.5, 0.0)
    assert row["categories"] == {"dark": {"strict": 0.5, "soft": 0.5, "n": 2}}
    assert row["missing"]["second_judge"] == "this world has no second judge"


def test_as_many_pictures_as_prompts() -> None:
    prompts, pictures = true_pictures(2)
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        score_pictures(pictures[:1], prompts)
    with pytest.raises(ValueError, match="0 pictures"):
        score_pictures([], [])


def test_scores_are_means_over_pictures(pipeline: Pipeline) -> None:
    evaluation = evaluate(Perfect(pipeline, "val", half=True), "val", 14, repeats=None, second_judge=False)
    assert evaluation.scores()["strict"] == 0.5
    assert 0.5 <= evaluation.scores()["soft"] < 1.0
    last = evaluation.table().splitlines()[-2].split()
    assert (last[0], last[1], last[3], last[4]) == ("all", "0.500", "-", "14")


def test_pictures_are_those_of_their_prompt_and_seed(pipeline: Pipeline) -> None:
    """Scored pictures are what anybody gets for that prompt and seed, whatever the batch."""
    evaluation = evaluate(pipeline, "heldout", 3, seed=5, batch=2, repeats=None)
    for index, (prompt, verdict) in enumerate(zip(evaluation.prompts, evaluation.verdicts, strict=True)):
        [image] = pipeline(prompt.text, seed=5 + index)
        assert scenes.check(np.asarray(image.image), prompt.spec) == verdict


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"n": 0}, ConfigError),
        ({"batch": 0}, ConfigError),
        ({"seed": -1}, InvalidRequest),
        ({"seed": 2**63 - 2}, InvalidRequest),
        ({"steps": 0}, InvalidRequest),
        ({"guidance": -1.0}, InvalidRequest),
        ({"repeats": (0, 8)}, ConfigError),
        ({"repeats": (8, 1)}, ConfigError),
    ],
)
def test_bad_numbers_fail_before_the_first_picture(
    pipeline: Pipeline, arguments: dict[str, object], error: type[Exception]
) -> None:
    perfect = Perfect(pipeline, "val")
    with pytest.raises(error, match="must be"):
        evaluate(perfect, "val", **({"n": 4, "batch": 1} | arguments))  # pyright: ignore[reportArgumentType]
    assert perfect.made == []


def test_an_untrained_schedule_is_in_the_row(pipeline: Pipeline) -> None:
    asked = {"repeats": None, "second_judge": False, "allow_untrained_schedule": True}
    rows = [evaluate(pipeline, "val", 1, steps=steps, **asked).summary() for steps in (2, None)]  # pyright: ignore[reportArgumentType]
    assert [(row["nfe"], row.get("untrained_schedule")) for row in rows] == [(2, True), (4, None)]


def test_the_command_prints_a_table_and_a_last_line_of_json(cli: Cli, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"kept": true}\n')
    flags = ["--split", "val", "--n", "8", "--batch", "4", "--no-diversity", "--results", results.name]
    done = cli("eval", "default", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar: stderr is no terminal
    *table, line = done.stdout.splitlines()
    row = json.loads(line)
    assert set(row) >= {"strict", "soft", "nfe", "categories", "n", "seed", "seconds", "machine", "checkpoint_hash"}
    assert (row["model"], row["split"], row["n"], row["nfe"], row["guidance"]) == ("default", "val", 8, 4, 1.0)
    assert sum(scores["n"] for scores in row["categories"].values()) == 8
    assert row["threads"] == row["machine"]["threads"]
    assert row["diversity"] is None and row["missing"]["diversity"] == "no prompt was repeated"
    assert row["second_judge"] is not None or "tesseract" in row["missing"]["second_judge"]
    assert table[0].split() == ["category", "strict", "soft", "second", "n"]
    assert [line.split()[0] for line in table[1:-1]] == [*row["categories"], "all"]
    assert results.read_text().splitlines() == ['{"kept": true}', line]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], ["no-such-model", "default"]),
        (["default", "--split", "test"], ["'test'", "heldout"]),
        (["default", "--n", "0"], ["0", "1 or more"]),
        (["default", "--batch", "0"], ["0", "1 or more"]),
        (["default", "--steps", "0"], ["0", "1 or more"]),
        (["default", "--seed", "-1"], ["-1", "0 to"]),
        (["default", "--steps", "8"], ["8", "trained for 4", "--allow-untrained-schedule"]),
        (["default", "--guidance-scale", "inf"], ["inf", "finite"]),
        (["default", "--guidance-scale", "-1"], ["-1", "between 0 and 30"]),
        # before the model is even looked for
        (["no-such-model", "--results", "missing/rows.jsonl"], ["cannot write missing/rows.jsonl"]),
        (["no-such-model", "--results", "."], ["cannot write ."]),
        (["no-such-model", "--results", "rows.jsonl"], ["no-such-model"]),
    ],
    ids=" ".join,
)
def test_bad_input_gives_a_sentence(
    arguments: list[str], words: list[str], refused: Callable[[list[str]], str]
) -> None:
    complaint = refused(["eval", *arguments])
    for word in words:
        assert word in complaint


@pytest.mark.parametrize(("model", "method"), [("default-teacher", "teacher"), ("default-tdm", "tdm")])
def test_a_row_names_the_method_that_made_the_model(model: str, method: str) -> None:
    assert method_of(model) == {"method": method, "reward": None}
