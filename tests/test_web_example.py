"""examples/web: its tokenizer and noise are Python's, and its pictures those of the same engine in Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdm_exporters.export import export
from tdm_exporters.options import Options
from tdm_finetune.scenes.check import check
from tdm_finetune.scenes.prompts import ScenePrompt, prompts
from tdm_serve import Pipeline
from tdm_serve.errors import ArtifactError, BackendUnavailable, ConfigError

WEB = Path(__file__).resolve().parent.parent / "examples" / "web"
sys.path.insert(0, str(WEB))  # for make_site and drive_page, which are scripts of the example

import drive_page  # noqa: E402
import make_site  # noqa: E402

ODD = (
    "", " ", "a  star\n\n", "\tIt's we'll they've I'd", "<|end|><|pad|>a<|scene|>", "<|end", "naïve Größe 12½ ٣٤",
    "日本語の円 🔴🔵", "e\u0301 \u00a0x\u2003 y \u0085z \ufeff.", "!?…—'s'S", "x" * 500, "\x00\x1f\x7f",
)  # fmt: skip
# In 8-bit values, over a picture, in the middle and at worst: int8 kernels round differently here and there, and four
# evaluations later an edge may lie elsewhere.
MIDDLE, WORST, SEED = 2.0, 8.0, 2000


def node(script: str, given: object) -> Any:
    """What an ES module beside the example's makes of `given`."""
    program = shutil.which("node") or make_site.npm()[0]  # of Node.js' wheel where there is none
    code = f"const given = JSON.parse(require('fs').readFileSync(0)); (async () => {{ {script} }})()"
    done = subprocess.run(
        [program, "-e", code], cwd=WEB, input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_tokenizer_is_pythons(pipeline: Pipeline) -> None:
    texts = [*(one.text for one in islice(prompts("heldout", seed=3), 400)), *ODD]
    folder = pipeline.engine.model.spec.base / "tokenizer"
    given = {
        "file": json.loads((folder / "tokenizer.json").read_text()),
        "template": make_site.template(folder),
        "texts": texts,
    }
    script = """
        const { Tokenizer } = await import("./tokenizer.js");
        const tokenizer = new Tokenizer(given.file, given.template);
        console.log(JSON.stringify(given.texts.map((text) => tokenizer.ids(text))));
    """
    assert node(script, given) == [pipeline.engine.model.tokens(text) for text in texts]


def test_the_noise_is_torchs() -> None:
    """For counts that 16 divides and others, and seeds of more than 32 and 53 bits."""
    wanted = [(seed, count) for seed in (0, 7, 2**32 - 1, 2**32 + 5, 2**63 - 1) for count in (16, 1024, 5001)]
    script = """
        const { noise } = await import("./noise.js");
        console.log(JSON.stringify(given.map(([seed, count]) => Array.from(noise(seed, count)))));
    """
    found = node(script, [(str(seed), count) for seed, count in wanted])
    for ours, (seed, count) in zip(found, wanted, strict=True):
        theirs = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(torch.tensor(ours), theirs, rtol=1e-5, atol=1e-6)


def test_a_folder_that_is_no_engine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_site.py", str(tmp_path), "-o", str(tmp_path / "out")])
    assert make_site.main() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {tmp_path} is no exported engine") and printed.err.count("\n") == 1
    assert printed.out == "" and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default checkpoint in int8."""
    folder = tmp_path_factory.mktemp("web") / "engine"
    export(Options("default", "onnx", folder, quantise="int8", verify=False))
    return folder


@pytest.fixture(scope="module")
def site(engine: Path) -> Path:
    folder = engine.parent / "site"
    try:
        make_site.build(engine, "default", folder)
    except BackendUnavailable as reason:
        pytest.skip(f"needs onnxruntime-web: {reason}")
    return folder


@pytest.fixture
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def away(ours: Sequence[Any], theirs: Sequence[Any]) -> list[float]:
    """Mean differences of pictures, pair by pair."""
    return [float(np.abs(a.astype(int) - b.astype(int)).mean()) for a, b in zip(ours, theirs, strict=True)]


def strict(picture: Any, scene: ScenePrompt) -> int:
    return check(picture, scene.spec).strict


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*without verification")
def test_pictures_in_chromium_are_those_of_the_engine_in_python(site: Path, engine: Path, browser: Any) -> None:
    scenes = list(islice(prompts("heldout", seed=1), 8))
    python = Pipeline.from_pretrained("default", engine=engine)
    with drive_page.serving(site) as url:
        page = drive_page.Page(browser, url)
        page.ready()
        ours = [page.picture(scene.text, SEED + i) for i, scene in enumerate(scenes)]
        figures = {name: page.figure(name) for name in ("download", "load", "threads", "evaluation", "total", "memory")}
        refusals = [page.ask(" ", 1), page.ask("red " * 80, 1), page.ask("a star", 2**63)]
        page.page.close()
    theirs = [np.asarray(python(scene.text, seed=SEED + i)[0].image) for i, scene in enumerate(scenes)]
    assert np.median(away(ours, theirs)) <= MIDDLE < np.median(away(ours, [*theirs[1:], theirs[0]]))
    assert max(away(ours, theirs)) <= WORST
    passed = [sum(map(strict, side, scenes)) for side in (ours, theirs)]
    assert passed[0] >= max(passed[1] - 1, len(scenes) // 2)
    assert page.complaints == []
    assert len(figures["evaluation"]) == 4 and figures["threads"] == [1]
    assert figures["download"][0] > sum(path.stat().st_size for path in site.rglob("*.onnx"))
    assert all(value > 0 for values in figures.values() for value in values)
    assert "is empty" in refusals[0] and "at most 64 are read" in refusals[1] and "between 0 and" in refusals[2]


@pytest.mark.slow
def test_a_half_copied_folder_says_so(site: Path, browser: Any, tmp_path: Path) -> None:
    half = shutil.copytree(site, tmp_path / "half")
    (half / "engine" / "decoder.onnx").write_bytes(b"cut")
    with drive_page.serving(half) as url:
        page = drive_page.Page(browser, url)
        page.page.locator("#status.failed").wait_for()
        said = page.page.locator("#status").inner_text()
        assert "decoder.onnx has 3 bytes, and its manifest promises" in said
        assert page.page.locator("#generate").is_disabled()
        page.page.close()


@pytest.mark.slow
def test_what_the_page_cannot_run_is_refused(engine: Path, site: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"was exported from default .* but default-tdm has"):
        make_site.build(engine, "default-tdm", tmp_path / "out")
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="is not empty and was not built by this script"):
        make_site.build(engine, "default", tmp_path)
    make_site.build(engine, "default", site)  # again, over itself
    assert (site / "index.html").is_file()
