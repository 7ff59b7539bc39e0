"""Argument types and options that several commands share. An error in one names the value and what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICE_HELP = "auto, cpu, cuda or cuda:N (default: auto)"
DTYPE_HELP = "auto, float32, bfloat16 or float16 (default: auto)"
BACKEND_HELP = "auto, eager or compiled; with --engine: onnx, onnx-cpu, onnx-cuda, onnx-tensorrt or pt2 (default: auto)"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, and how to run it."""
    parser.add_argument("--model", default="default", metavar="ID|FOLDER", help="see `tdm-serve models`")
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and --backend. Values are checked where they are used, so that the lists agree."""
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--dtype", default="auto", help=DTYPE_HELP)
    parser.add_argument("--backend", default="auto", help=BACKEND_HELP)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """--offload, --quantise, --max-memory and --random-weights; `memory_of` reads them."""
    parser.add_argument("--offload", default="none", help="none, or text: text encoders stay on the host")
    parser.add_argument("--quantise", default="none", help="none, or fp8: the network's weights in eight bits")
    parser.add_argument(
        "--max-memory", type=finite_number, metavar="GB", help="most that the model takes on its device"
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="build the model at full size without a download: pictures are noise",
    )


def memory_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `Engine.load` and `Pipeline.from_pretrained` call memory."""
    return {
        "offload": args.offload,
        "quantise": args.quantise,
        "max_memory_gb": args.max_memory,
        "random_weights": args.random_weights,
    }


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an int of at least `low` and at most `high`."""
    allowed = f"{low} to {high}" if high is not None else f"{low} or more"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; allowed: {allowed}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: {allowed}")
        return value

    return parse


def finite_number(text: str) -> float:
    """An argparse type: a float that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def existing_folder(text: str) -> Path:
    """An argparse type: a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path
