"""The benchmarks run, and the documents' tables are what the committed result files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def script(root: Path, environment: dict[str, str], name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def test_the_documents_agree_with_the_results(root: Path, environment: dict[str, str]) -> None:
    done = script(root, environment, "report.py", "--check")
    assert done.returncode == 0, done.stderr


def test_result_rows_say_what_they_were_measured_on(root: Path) -> None:
    files = [*(root / "benchmarks" / "results").glob("*.jsonl"), *(root / "tdm_serve").rglob("metrics.jsonl")]
    assert len(files) >= 2
    for path in files:
        for line in path.read_text().splitlines():
            machine = json.loads(line)["machine"]
            assert {"device", "threads", "omp_wait_policy", "commit", "versions"} <= machine.keys(), path.name


STORY = {"method", "world", "reward", "split", "nfe", "strict", "soft", "categories", "palette_error", "diversity"}


def test_result_rows_tell_the_story(root: Path) -> None:
    files = [root / "benchmarks" / "results" / "experiments.jsonl", *(root / "tdm_serve").rglob("metrics.jsonl")]
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert {*STORY, "second_judge", "seconds", "seed"} <= row.keys(), path.name
            assert row["second_judge"] is not None or row["missing"]["second_judge"], path.name


@pytest.mark.slow
def test_latency_prints_a_table_and_a_last_line_of_json(root: Path, environment: dict[str, str]) -> None:
    options = ("--no-compiled", "--peers", "diffusers", "cudnn", "--repeats", "3", "--warmup", "1", "--batch", "2")
    done = script(root, environment, "latency.py", *options)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["nfe"] == 4 and row["largest_difference"] <= 2 and row["batch"] == 2
    assert set(row["milliseconds"]) == set(row["nfe_counted"]) == {"tdm-serve", "diffusers"}
    assert set(row["roofline"]) == {"text", "denoise", "decode"} and row["ceilings"]["matmul_gflops"] > 0
    assert row["absent"] == {"diffusers + cuDNN": "cuDNN attention is for NVIDIA GPUs"}
    assert all(
        stage["p20"] <= stage["p50"] <= stage["p80"] for s in row["milliseconds"].values() for stage in s.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tdm", "tdm-r1"])
def test_training_of_random_weights_goes_the_way_of_full_size(
    root: Path, environment: dict[str, str], method: str
) -> None:
    sizes = ["--pictures", "4", "--group", "2", "--micro-batch", "2", "--repeats", "1"]
    done = script(root, environment, "training.py", "--size", "sd35-medium:tiny", "--method", method, *sizes)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["nfe"] == 4 * {"tdm": 9, "tdm-r1": 15}[method]  # as a dry run of any model says
    assert row["images_per_second"]["update"] > 0 and row["memory_mb"] > 0
    assert 0 < row["trained"] < row["parameters"] and row["size"] == "64x64"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which may well hold it")
def test_training_at_full_size_says_in_a_sentence_that_there_is_no_gpu(root: Path, environment: dict[str, str]) -> None:
    done = script(root, environment, "training.py", "--size", "sd35-medium", "--keep")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: sd35-medium at full size needs a CUDA GPU, and torch ")
    unknown = script(root, environment, "training.py", "--size", "sd4")
    assert unknown.returncode == 1 and "size 'sd4' is unknown; choose sd35-medium" in unknown.stderr


def test_full_sizes_need_a_gpu(root: Path, environment: dict[str, str]) -> None:
    done = script(root, environment | {"CUDA_VISIBLE_DEVICES": ""}, "fullsize.py", "--keep")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "this needs an NVIDIA GPU, and torch sees none; `tdm-serve bench` measures on a CPU\n"


@pytest.mark.slow
def test_full_sizes_print_rows_and_say_what_failed(root: Path, environment: dict[str, str]) -> None:
    models = ("--model", "dreamshaper7-tdm:tiny", "--model", "nobody", "--model", "zimage-tdm-r1:tiny")
    options = ("--size", "64x64", "--batch", "1", "--repeats", "1", "--device", "cpu", "--no-compiled")
    done = script(root, environment, "fullsize.py", *models, *options)
    failed = "nobody, none, 64x64, batch 1: tdm_serve.errors.UnknownModel: model 'nobody' cannot have random weights"
    assert done.returncode == 1 and failed in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(row["benchmark"], row["model"]) for row in rows] == [
        ("fullsize", "dreamshaper7-tdm"),
        ("fullsize", "zimage-tdm-r1"),
    ]
    assert rows[0]["random_weights"] and rows[0]["rows"][0]["nfe"] == 4 and "Z-Image, " in done.stdout


@pytest.mark.slow
def test_the_decoder_is_timed_in_both_layouts(root: Path, environment: dict[str, str]) -> None:
    done = script(root, environment, "decoder.py", "--repeats", "3", "--warmup", "1", "--tile", "64")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert set(row["milliseconds"]) == {"channels-last", "contiguous"}
    assert (
        row["relative_difference"] < 1e-4 < row["tile_relative_difference"] < 1
    )  # of noise, which has no smooth parts


@pytest.mark.slow
def test_mixing_compares_rows_before_it_times(root: Path, environment: dict[str, str]) -> None:
    done = script(root, environment, "mixing.py", "--repeats", "2", "--warmup", "1")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert len(row["cases"]) == 8
    assert all(case["difference"] == 0.0 and case["together_over_apart"]["p50"] > 0 for case in row["cases"])
