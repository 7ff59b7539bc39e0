"""`tdm-serve bench`: what a model costs on this machine, stage by stage, and one sentence of advice."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdm_serve.cli import options

if TYPE_CHECKING:
    from tdm_serve.bench import Row
    from tdm_serve.engine import Engine

MOST_BATCH = 64
BATCHES = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how it is loaded, and what is measured."""
    options.add_model_options(parser)
    options.add_memory_options(parser)
    parser.add_argument(
        "--size",
        action="append",
        metavar="WxH",
        help="in pixels, several times for several (default: the model's own)",
    )
    parser.add_argument(
        "--batch",
        action="append",
        type=options.whole_number(1, MOST_BATCH),
        metavar="N",
        help=f"pictures at once, several times for several (default: {', '.join(map(str, BATCHES))})",
    )
    parser.add_argument("--repeats", type=options.whole_number(1, 1000), default=5, help="timed rounds (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")


def run(args: argparse.Namespace) -> int:
    """Loads, checks, times, and reports; the last line is JSON."""
    from tdm_serve import bench
    from tdm_serve.validation import parse_size

    sizes = [parse_size(size) for size in args.size or ()]
    expected = _unquantised(args, sizes)
    before = bench.resident_mb()
    started = time.perf_counter()
    engine = _load(args)
    load_s = time.perf_counter() - started
    held = bench.held_mb(engine) - (before if engine.model.device.type == "cpu" else 0.0)
    sizes = sizes or [(engine.info.width, engine.info.height)]
    first_ms = bench.first_picture_ms(engine, *sizes[0])
    rows = _measured(engine, sizes, sorted(set(args.batch or BATCHES)), args.repeats)
    report: dict[str, Any] = {
        **_about(args, engine),
        "load_s": round(load_s, 2),
        "model_mb": round(held, 1),
        "first_picture_ms": round(first_ms, 1),
        "rows": [row.as_json() for row in rows],
        "advice": bench.advice(engine, rows),
    }
    if expected is not None:
        found = bench.output_of(engine, *sizes[0])
        report["fp8_relative_error"] = round(bench.relative_error(found, expected), 5)
    if not args.json:
        print("\n".join(_table(report, rows)))
    print(json.dumps(report))
    return 0


def _load(args: argparse.Namespace, **changes: Any) -> Engine:
    from tdm_serve.engine import Engine

    memory: Any = options.memory_of(args) | changes
    return Engine.load(args.model, device=args.device, dtype=args.dtype, backend=args.backend, cache_mb=0, **memory)


def _unquantised(args: argparse.Namespace, sizes: Sequence[tuple[int, int]]) -> Any:
    """The network's output before its weights are rounded, where they are to be; the model is loaded for it once."""
    if args.quantise == "none":
        return None
    from tdm_serve import bench

    engine = _load(args, quantise="none", max_memory_gb=None)
    output = bench.output_of(engine, *(sizes[0] if sizes else (engine.info.width, engine.info.height)))
    device, empty = engine.model.device, engine.empty_cache
    del engine
    if device.type == "cuda":
        empty()
    return output


def _measured(engine: Engine, sizes: Sequence[tuple[int, int]], batches: Sequence[int], repeats: int) -> list[Row]:
    from tdm_serve.bench import measure

    rows: list[Row] = []
    for width, height in sizes:
        for batch in batches:
            row = measure(engine, width, height, batch, repeats)
            if row is None:  # nor would a larger one fit
                break
            rows.append(row)
    return rows


def _about(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    from tdm_serve.machine import stamp

    place = engine.model.placement
    return {
        "benchmark": "bench",
        "model": engine.info.id,
        "family": engine.info.family,
        "random_weights": place.random,
        "checkpoint_hash": engine.info.checkpoint_hash,
        "nfe": engine.info.nfe,
        "dtype": str(place.dtype).removeprefix("torch."),
        "backend": args.backend,
        "strict": engine.strict,
        "quantise": place.quantise,
        "text_device": str(place.text),
        "repeats": args.repeats,
        "machine": stamp(),
    }


def _table(report: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    noise = ", random weights: pictures are noise" if report["random_weights"] else ""
    loaded, first = f"{report['load_s']:.1f} s, {report['model_mb']:.0f} MB", report["first_picture_ms"]
    lines = [
        f"{report['model']}, {report['dtype']} on {report['machine']['device']}, {report['nfe']} NFE{noise}",
        f"loaded in {loaded}; first picture {first:.0f} ms",
    ]
    if "fp8_relative_error" in report:
        lines.append(f"fp8 changes the network's output by {report['fp8_relative_error']:.2%}")
    head = ("size", "batch", "text", "evaluation", "denoise", "decode", "png", "total ms", "images/s", "MB")
    lines.append("".join(f"{word:>11}" for word in head))
    for row in rows:
        ms = row.ms
        cells = [f"{row.width}x{row.height}", str(row.batch), f"{ms['text']:.1f}", f"{row.evaluation_ms:.1f}"]
        cells += [f"{ms[stage]:.1f}" for stage in ("denoise", "decode", "png", "total")]
        cells += [f"{row.images_per_second:.2f}", f"{row.memory_mb:.0f}"]
        lines.append("".join(f"{cell:>11}" for cell in cells))
    for row in (row for row in rows if row.batch == rows[0].batch):
        where = ", ".join(f"{stage} {share:.0%}" for stage, share in row.shares.items())
        lines.append(f"where the time goes at {row.width}x{row.height}, batch {row.batch}: {where}")
    return [*lines, f"advice: {report['advice']}"]
