"""`tdm-serve export`: one checkpoint to a folder that `--backend` serves, compared with eager before it has a name."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdm_serve.cli import options
from tdm_serve.errors import InvalidRequest, NotBuiltYet

if TYPE_CHECKING:
    from tdm_serve.pipeline import Pipeline

EXPORTER, SCORER = "tdm_exporters.export", "tdm_finetune.evaluate"  # by name: the SDK imports neither

FORMATS = ("onnx", "tensorrt", "tensorrt-rtx", "pt2")
DTYPES = ("fp16", "bf16", "fp32")
ATTENTION = ("plugin", "standard", "decomposed")
PLUGIN_FORMATS = ("onnx", "tensorrt", "tensorrt-rtx")
BUILT = ("onnx", "pt2")
QUANTISE = ("none", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, in which form, for which shapes."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an id (see `tdm-serve models`) or a folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: the checkpoint's own)")
    parser.add_argument("--sizes", type=sizes, metavar="WxH[,WxH...]", help="(default: the checkpoint's own size)")
    parser.add_argument("--batch", type=batch_range, default=(1, 4), metavar="MIN-MAX", help="(default: 1-4)")
    parser.add_argument("--text-len", type=options.whole_number(1), metavar="TOKENS", help="longest prompt")
    parser.add_argument("--attention", choices=ATTENTION, default="standard", help="(default: standard)")
    parser.add_argument(
        "--function-body",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --attention plugin: define the node for runtimes that have no plugin (default)",
    )
    parser.add_argument("--quantise", choices=QUANTISE, default="none", help="int8 linears, ONNX only (default: none)")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare with eager before publishing"
    )
    parser.add_argument(
        "--score-prompts",
        type=options.whole_number(0),
        default=256,
        metavar="N",
        help="score checkpoints of the synthetic world on N prompts, before and after; 0 is not at all (default: 256)",
    )


def run(args: argparse.Namespace) -> int:
    """0 for a published folder, 1 for an export that is not eager's equal, of which nothing is kept."""
    if args.attention == "plugin" and args.format not in PLUGIN_FORMATS:
        raise InvalidRequest(
            f"--attention plugin does not go with --format {args.format}; allowed: " + ", ".join(PLUGIN_FORMATS)
        )
    if args.format not in BUILT:
        raise NotBuiltYet(
            f"--format {args.format} is not built yet, so {args.checkpoint!r} cannot be exported to it; "
            f"allowed: {', '.join(BUILT)}"
        )
    exporter = import_module(EXPORTER)
    report = exporter.export(
        exporter.Options(
            checkpoint=args.checkpoint,
            kind=args.format,
            output=args.output,
            dtype=args.dtype,
            sizes=tuple(args.sizes or ()),
            batch=args.batch,
            text=args.text_len,
            attention=args.attention,
            body=args.function_body,
            quantise=args.quantise,
            verify=args.verify,
            score=_score(args.checkpoint, args.score_prompts) if args.verify else None,
            say=_say,
        )
    )
    if report is not None:
        if report.failures:
            print(f"error: not published, because it is not eager's equal. {report.failures[0]}", file=sys.stderr)
            return 1
        _summary(report)
    print(args.output)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _summary(report: Any) -> None:
    """What was verified, in a few lines."""
    for name, row in report.parts.items():
        print(f"{name:<14} largest relative error {row['largest_relative']:.2g}, mean {row['mean_relative']:.2g}")
    picture = report.picture
    print(f"pictures       differ by at most {picture['largest']:.0f} of 255, {picture['mean']:.3f} in the mean")
    if report.score is not None:
        print(f"strict score   {report.score['before']:.3f} before, {report.score['after']:.3f} after")
    print(f"a picture      {report.latency_ms['before']:.1f} ms before, {report.latency_ms['after']:.1f} ms after")


def _score(checkpoint: str, prompts: int) -> Callable[[Pipeline], float] | None:
    """The synthetic world's exact checker, for checkpoints that read its language; None for others."""
    from tdm_serve.models.catalog import resolve
    from tdm_serve.models.inspect import encoder_hash

    if prompts == 0 or encoder_hash(resolve(checkpoint)) != encoder_hash(resolve("default")):
        return None
    evaluate = import_module(SCORER).evaluate

    def strict(pipeline: Pipeline) -> float:
        made = evaluate(pipeline, "heldout", prompts, repeats=None, second_judge=False)
        return float(made.scores()["strict"])

    return strict


def sizes(text: str) -> list[tuple[int, int]]:
    """An argparse type: "512x512,1024x768" -> [(512, 512), (1024, 768)]."""
    from tdm_serve.validation import parse_size

    try:
        return [parse_size(part) for part in text.split(",")]
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def batch_range(text: str) -> tuple[int, int]:
    """An argparse type: "1-4" -> (1, 4), "2" -> (2, 2)."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no batch range; allowed: N or MIN-MAX with 1 <= MIN <= MAX")
    return low, high
