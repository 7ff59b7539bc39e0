"""`tdm-serve eval CHECKPOINT`: the table of scores by category, and a last line of JSON with all that was measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tdm_finetune.scenes import SPLITS
from tdm_serve.cli import options
from tdm_serve.core import MAX_SEED
from tdm_serve.files import append_line, check_appendable

REPEATS = (8, 8)  # prompts, and seeds of each, from which the diversity is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to score, on which prompts, and how to sample."""
    parser.add_argument("checkpoint", help="a model id, a checkpoint folder, or one version of it: FOLDER@VERSION")
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="which prompts (default: heldout)")
    parser.add_argument("--n", type=options.whole_number(1), default=512, help="how many prompts (default: 512)")
    parser.add_argument(
        "--seed",
        type=options.whole_number(0, MAX_SEED),
        default=0,
        help="of the prompt stream and the first picture (default: 0)",
    )
    parser.add_argument(
        "--steps", type=options.whole_number(1), help="another number of steps than the checkpoint's own"
    )
    parser.add_argument(
        "--allow-untrained-schedule",
        action="store_true",
        help="take a number of --steps that a few-step checkpoint was not trained for",
    )
    parser.add_argument(
        "--guidance-scale",
        type=options.finite_number,
        help="another one than the checkpoint's own, as its family counts it; 0 is off for Z-Image",
    )
    parser.add_argument("--batch", type=options.whole_number(1), default=16, help="pictures at a time (default: 16)")
    parser.add_argument(
        "--diversity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure how much pictures of one prompt differ; makes 64 more (default)",
    )
    parser.add_argument(
        "--second-judge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the judge that is never a reward, too; words need the program tesseract (default)",
    )
    options.add_device_options(parser)
    parser.add_argument("--results", type=Path, help="append the JSON line to this file")


def run(args: argparse.Namespace) -> int:
    """Prints the table and the line of JSON, which holds the machine's stamp."""
    from tdm_finetune.evaluate import evaluate
    from tdm_serve import Pipeline
    from tdm_serve.machine import stamp
    from tdm_serve.validation import weight_of

    if args.results is not None:
        check_appendable(args.results)
    pipeline = Pipeline.from_pretrained(args.checkpoint, device=args.device, dtype=args.dtype, backend=args.backend)
    scale = args.guidance_scale
    evaluation = evaluate(
        pipeline,
        args.split,
        args.n,
        seed=args.seed,
        steps=args.steps,
        guidance=None if scale is None else weight_of(scale, pipeline.info.guidance_off),
        allow_untrained_schedule=args.allow_untrained_schedule,
        batch=args.batch,
        repeats=REPEATS if args.diversity else None,
        second_judge=args.second_judge,
    )
    line = json.dumps({"world": "scenes", **method_of(args.checkpoint), **evaluation.summary(), "machine": stamp()})
    print(evaluation.table())
    if args.results is not None:
        append_line(args.results, line)
    print(line)
    return 0


def method_of(checkpoint: str) -> dict[str, Any]:
    """Which trainer made a checkpoint's version, and with what reward; a base without lineage is a teacher."""
    from tdm_serve.models.catalog import resolve
    from tdm_serve.models.spec import MANIFEST

    spec = resolve(checkpoint)
    version = json.loads((spec.base / MANIFEST).read_text())["versions"][spec.version]
    lineage = version.get("lineage", {"method": "teacher"})
    return {"method": lineage["method"], "reward": lineage.get("config", {}).get("reward")}
