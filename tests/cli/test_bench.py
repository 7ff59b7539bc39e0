"""`tdm-serve bench` checks, times and advises; its last line is JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tdm_serve import Pipeline
from tdm_serve.bench import Row, advice, first_picture_ms, measure, output_of, relative_error
from tdm_serve.cli.main import main
from tdm_serve.engine import Engine
from tdm_serve.errors import OutOfDeviceMemory, PictureFailed

STAGES = ("text", "denoise", "decode", "png")
Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_a_table_and_a_line_of_json(cli: Cli, tmp_path: Path) -> None:
    """In a new process: one that has held models before takes no more memory for another."""
    done = cli("bench", "--batch", "2", "--batch", "1", "--repeats", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1])
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    assert (report["nfe"], report["dtype"], report["random_weights"]) == (4, "float32", False)
    assert report["load_s"] > 0 and report["model_mb"] > 10 and report["machine"]["versions"]["torch"]
    for row in report["rows"]:
        assert row["nfe"] == 4 and abs(row["ms"]["denoise"] - 4 * row["evaluation_ms"]) < 0.1
        assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01) and all(row["ms"][name] > 0 for name in STAGES)
        assert sum(row["ms"][name] for name in STAGES) == pytest.approx(row["ms"]["total"], rel=0.5)
        assert row["images_per_second"] == pytest.approx(row["batch"] * 1000 / row["ms"]["total"], rel=0.01)
    assert lines[0].startswith("default, float32 on ") and "loaded in " in lines[1]
    assert lines[-2] == f"advice: {report['advice']}" and lines[-3].startswith(
        "where the time goes at 128x128, batch 1"
    )


def test_json_alone_of_a_model_without_a_download(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--model", "sd35-medium-tdm:tiny", "--random-weights", "--repeats", "1", "--batch", "1"]
    assert main([*arguments, "--size", "64x64", "--size", "96x64", "--offload", "text", "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["random_weights"] and report["text_device"] == "cpu" and "fp8_relative_error" not in report
    assert [(row["width"], row["height"]) for row in report["rows"]] == [(64, 64), (96, 64)]


WRONG = {
    "size": (["--size", "100x128"], "width"),
    "no size": (["--size", "big"], "'big' is not of the form"),
    "batch": (["--batch", "0"], "allowed: 1 to 64"),
    "offload": (["--offload", "all"], "offload is 'all'; it must be none or text"),
    "bound": (["--max-memory", "0.01"], "may be taken"),
    "random": (["--model", "none", "--random-weights"], "cannot have random weights"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_mistakes(refused: Callable[[list[str]], str], arguments: list[str], sentence: str) -> None:
    assert sentence in refused(["bench", *arguments])


def test_no_time_is_told_of_what_is_wrong() -> None:
    """A network that returns one value everywhere, and one that is called once too often."""
    engine = Engine.load("default", cache_mb=0)
    inner = engine.denoise.denoise

    def twice(*args: Any) -> torch.Tensor:
        engine.denoise.evaluations += 1
        return inner(*args)

    engine.denoise.denoise = twice
    with pytest.raises(PictureFailed, match="8 evaluations were counted for 1 pictures of 4"):
        measure(engine, 128, 128, 1, 1)
    engine.denoise.denoise = inner
    assert measure(engine, 128, 128, 1, 1) is not None
    engine.model.vae.decoder.conv_out.weight.zero_()
    with pytest.raises(PictureFailed, match="in one colour"):
        measure(engine, 128, 128, 1, 1)


def test_what_does_not_fit_is_no_row() -> None:
    engine = Engine.load("default", cache_mb=0)

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    engine.denoise.denoise = full
    assert measure(engine, 128, 128, 1, 1) is None
    with pytest.raises(OutOfDeviceMemory, match="a single picture of 128x128 does not fit beside the model"):
        first_picture_ms(engine, 128, 128)


def row(share_of: str, batch: int = 1, rate: float = 1.0) -> Row:
    ms = {name: 60.0 if name == share_of else 10.0 for name in STAGES}
    return Row(128, 128, batch, 4, ms | {"total": 90.0}, 1.0, rate, 1.0)


def test_advice_is_about_where_the_time_goes(pipeline: Pipeline) -> None:
    engine = pipeline.engine
    assert advice(engine, [row("text")]).startswith(
        "at 128x128 reading the prompt takes 67% of a picture: prompts that"
    )
    assert "channels-last already" in advice(engine, [row("decode")])
    assert "WebP" in advice(engine, [row("png")])
    assert "--batch" in advice(engine, [row("denoise")])
    assert "batches of 4 make 2.0 times as many" in advice(engine, [row("denoise"), row("denoise", 4, 2.0)])
    assert "batches of up to 4 do not help here" in advice(engine, [row("denoise"), row("denoise", 4, 1.1)])
    assert advice(engine, []).startswith("nothing fitted")


def test_the_output_is_what_the_network_returned(pipeline: Pipeline) -> None:
    engine, seen = pipeline.engine, list[torch.Tensor]()
    inner = engine.denoise.denoise
    engine.denoise.denoise = lambda *args: seen.append(inner(*args)) or seen[-1]
    try:
        found = output_of(engine, 128, 128)
    finally:
        engine.denoise.denoise = inner
    assert torch.allclose(found, seen[0].float(), atol=1e-5)
    assert relative_error(found, found) == 0 and relative_error(found * 1.1, found) == pytest.approx(0.1, rel=1e-3)
