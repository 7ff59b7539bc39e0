"""The benchmarks run, and the documents' tables are what the committed result files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
    done = script(root, environment, "latency.py", "--repeats", "3", "--warmup", "1")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["nfe"] == 4 and row["largest_difference"] <= 2
    assert set(row["milliseconds"]) == {"tdm-serve", "diffusers"}
    assert all(
        stage["p20"] <= stage["p50"] <= stage["p80"] for s in row["milliseconds"].values() for stage in s.values()
    )
