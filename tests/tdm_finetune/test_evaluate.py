"""`tdm-serve eval` on a few prompts: the table, the line of JSON, and bad input before the long run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdm_finetune import scenes
from tdm_finetune.data import examples
from tdm_finetune.evaluate import evaluate
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
    evaluation = evaluate(perfect, "heldout", 14, batch=4)
    assert perfect.made == [4, 4, 4, 2]
    assert evaluation.scores() == {"strict": 1.0, "soft": 1.0, "n": 14}
    summary = evaluation.summary()
    assert list(summary["categories"]) == list(scenes.CATEGORIES)
    assert all(scores == {"strict": 1.0, "soft": 1.0, "n": 2} for scores in summary["categories"].values())
    assert summary["nfe"] == 4 and summary["checkpoint_hash"] == pipeline.info.checkpoint_hash


def test_scores_are_means_over_pictures(pipeline: Pipeline) -> None:
    evaluation = evaluate(Perfect(pipeline, "val", half=True), "val", 14)
    assert evaluation.scores()["strict"] == 0.5
    assert 0.5 <= evaluation.scores()["soft"] < 1.0
    last = evaluation.table().splitlines()[-2].split()
    assert (last[0], last[1], last[3]) == ("all", "0.500", "14")


def test_pictures_are_those_of_their_prompt_and_seed(pipeline: Pipeline) -> None:
    """Scored pictures are what anybody gets for that prompt and seed, whatever the batch."""
    evaluation = evaluate(pipeline, "heldout", 3, seed=5, batch=2)
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
    ],
)
def test_bad_numbers_fail_before_the_first_picture(
    pipeline: Pipeline, arguments: dict[str, float], error: type[Exception]
) -> None:
    perfect = Perfect(pipeline, "val")
    with pytest.raises(error, match="must be"):
        evaluate(perfect, "val", **({"n": 4, "batch": 1} | arguments))  # pyright: ignore[reportArgumentType]
    assert perfect.made == []


def test_the_command_prints_a_table_and_a_last_line_of_json(cli: Cli, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"kept": true}\n')
    done = cli("eval", "default", "--split", "val", "--n", "8", "--batch", "4", "--results", results.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar: stderr is no terminal
    *table, line = done.stdout.splitlines()
    row = json.loads(line)
    assert set(row) >= {"strict", "soft", "nfe", "categories", "n", "seed", "seconds", "machine", "checkpoint_hash"}
    assert (row["model"], row["split"], row["n"], row["nfe"], row["guidance"]) == ("default", "val", 8, 4, 1.0)
    assert sum(scores["n"] for scores in row["categories"].values()) == 8
    assert table[0].split() == ["category", "strict", "soft", "n"]
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
        (["default", "--guidance", "inf"], ["inf", "finite"]),
        (["default", "--guidance", "-1"], ["-1", "between 0 and 30"]),
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
