"""An int8 engine of the default checkpoint in a browser: megabytes, peak memory, seconds; pictures beside Python's.

Headless Chromium on this machine, the page of `examples/web`, a fresh browser for each number of threads. The page's
own figures are read: seconds are from the button to the canvas, and a first picture, for which Chromium still compiles,
stands apart. Peak memory is the page's whole process, as the system counts it, beside that of an empty page.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import harness  # first: it sets the OpenMP policy before torch loads
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "web"))

from drive_page import Page, peak_mb, serving
from make_site import HERE, build

from tdm_finetune.scenes.check import check
from tdm_finetune.scenes.prompts import ScenePrompt, prompts
from tdm_serve import Pipeline

SEED = 3000


def megabytes(site: Path) -> dict[str, Any]:
    """What a browser fetches, by kind, and what it would be if the server compressed it."""
    kinds: dict[str, list[Path]] = {"runtime": [], "graphs": [], "page": []}
    for path in (path for path in site.rglob("*") if path.is_file()):
        kind = "runtime" if path.parent.name == "runtime" else "graphs" if path.suffix == ".onnx" else "page"
        kinds[kind].append(path)
    plain = {kind: round(sum(path.stat().st_size for path in paths) / 1e6, 2) for kind, paths in kinds.items()}
    packed = sum(len(gzip.compress(path.read_bytes())) for paths in kinds.values() for path in paths)
    return {**plain, "total": round(sum(plain.values()), 2), "gzip": round(packed / 1e6, 2)}


def run(playwright: Any, site: Path, threads: int, scenes: Sequence[ScenePrompt]) -> tuple[dict[str, Any], list[Any]]:
    """Figures of one browser, and its pictures."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
    blank = browser.new_page()
    blank.goto("about:blank")
    empty = peak_mb(browser)
    pictures: list[Any] = []
    spent: list[dict[str, list[float]]] = []
    with serving(site) as url:
        page = Page(browser, f"{url}?threads={threads}")
        page.ready()
        for index, scene in enumerate(scenes):
            pictures.append(page.picture(scene.text, SEED + index))
            spent.append({name: page.figure(name) for name in ("evaluation", "total")})
        first, *rest = spent
        figures = {
            "load_s": round(page.figure("load")[0], 2),
            "first_picture_s": round(first["total"][0], 3),
            "picture_s": harness.percentiles([one["total"][0] for one in rest]),
            "evaluation_s": harness.percentiles([value for one in rest for value in one["evaluation"]]),
            "peak_mb": round(peak_mb(browser)),
            "empty_page_peak_mb": round(empty),
        }
        if threads == 1:  # Chromium does not answer while threads wait for work
            figures["page_mb"] = round(page.figure("memory")[0] / 1e6, 1)
        page.page.close()
    assert not page.complaints, page.complaints
    version = browser.version
    browser.close()
    return figures | {"chromium": version}, pictures


def beside_python(engine: Path, scenes: Sequence[ScenePrompt], pictures: Sequence[Any]) -> dict[str, Any]:
    """How far pictures are from those of the same engine in Python, in 8-bit values, and who passes the checker."""
    python = Pipeline.from_pretrained("default", engine=engine)
    theirs = [np.asarray(python(scene.text, seed=SEED + i)[0].image) for i, scene in enumerate(scenes)]
    away = [np.abs(a.astype(int) - b.astype(int)) for a, b in zip(pictures, theirs, strict=True)]
    strict = {
        name: sum(check(picture, scene.spec).strict for picture, scene in zip(side, scenes, strict=True))
        for name, side in (("browser", pictures), ("python", theirs))
    }
    return {
        "mean": round(float(np.mean([one.mean() for one in away])), 3),
        "mean_of_worst": round(max(float(one.mean()) for one in away), 3),
        "strict": strict,
    }


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, metavar="DIR", help="an int8 engine of `default`, by tdm-serve export")
    parser.add_argument("--pictures", type=int, default=21, help="the first stands apart (default: 21)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", action="store_true", help="append the row to benchmarks/results/web.jsonl")
    args = parser.parse_args()
    scenes = list(islice(prompts("heldout", seed=2), args.pictures))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        site = Path(folder) / "site"
        build(args.engine, "default", site)
        sizes = megabytes(site)
        runs = {str(count): run(playwright, site, count, scenes) for count in args.threads}
    figures = {count: found for count, (found, _) in runs.items()}
    _, pictures = runs[str(args.threads[0])]
    info = Pipeline.from_pretrained("default").info
    lock = harness.json.loads((HERE / "package-lock.json").read_text())
    row = {
        "model": info.id,
        "checkpoint_hash": info.checkpoint_hash,
        "size": f"{info.width}x{info.height}",
        "nfe": info.nfe,
        "pictures": args.pictures,
        "onnxruntime_web": lock["packages"]["node_modules/onnxruntime-web"]["version"],
        "megabytes": sizes,
        "threads": figures,
        "beside_python": beside_python(args.engine, scenes, pictures),
    }
    harness.publish("web", row, keep=args.keep)


if __name__ == "__main__":
    main()
