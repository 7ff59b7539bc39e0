"""`tdm-serve export`: the options of the exporter, checked; the exporter itself is not finished and says so."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tdm_serve.cli import options
from tdm_serve.errors import InvalidRequest, NotBuiltYet

FORMATS = ("onnx", "tensorrt", "tensorrt-rtx", "pt2")
DTYPES = ("fp16", "bf16", "fp32")
ATTENTION = ("plugin", "standard", "decomposed")
PLUGIN_FORMATS = ("onnx", "tensorrt", "tensorrt-rtx")


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
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare with eager before publishing"
    )


def run(args: argparse.Namespace) -> int:
    """Raises NotBuiltYet after the options have been checked."""
    if args.attention == "plugin" and args.format not in PLUGIN_FORMATS:
        raise InvalidRequest(
            f"--attention plugin does not go with --format {args.format}; allowed: " + ", ".join(PLUGIN_FORMATS)
        )
    raise NotBuiltYet(
        f"`tdm-serve export` is not built yet, so {args.checkpoint!r} cannot be exported to {args.format}; "
        "until it is, serve the checkpoint itself with `tdm-serve serve --model`"
    )


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
