"""`tdm-serve generate`: prompts to PNG files.

Everything that can be wrong is looked at before the model loads (paths, size, seed, count) or before the first step
(prompts), and each picture is on disk as soon as its batch is done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tdm_serve.cli import options, output
from tdm_serve.core import MAX_IMAGES, MAX_SEED, GeneratedImage, ModelInfo, Request, StepCallback, StepEvent
from tdm_serve.errors import InvalidRequest
from tdm_serve.files import write_atomically

BATCH = 8  # pictures at a time: bounds memory, and how much an interruption can cost
QUIET_S = 2.0  # work shorter than this shows no progress bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to make, with which model, and where it goes."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; each gets its own pictures")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="a file.png, a folder, or a name with {slug}, {seed}, {index} (default: named after prompt and seed)",
    )
    options.add_model_options(parser)
    options.add_memory_options(parser)
    parser.add_argument("--engine", type=options.existing_folder, metavar="DIR", help="an exported engine's folder")
    parser.add_argument(
        "--seed",
        type=options.whole_number(0, MAX_SEED),
        help="of the first picture; the next ones, of any prompt, count up (default: random)",
    )
    parser.add_argument("--size", metavar="WxH", help="in pixels (default: the model's own)")
    parser.add_argument(
        "-n", type=options.whole_number(1, MAX_IMAGES), default=1, help=f"pictures per prompt, 1 to {MAX_IMAGES}"
    )
    parser.add_argument(
        "--steps", type=options.whole_number(1), help="sampling steps (default: those the model was trained for)"
    )
    parser.add_argument(
        "--allow-untrained-schedule",
        action="store_true",
        help="take a number of --steps that a few-step model was not trained for",
    )
    parser.add_argument(
        "--guidance-scale",
        type=options.finite_number,
        help="as the model's family counts it: `tdm-serve models` tells what is off (default: the model's own)",
    )
    parser.add_argument(
        "--truncate-prompt", action="store_true", help="cut a prompt that is too long, instead of refusing it"
    )
    parser.add_argument(
        "--adapter-scale",
        type=options.finite_number,
        help="multiply what the model's adapter adds to its base; 0 is the base (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")


def run(args: argparse.Namespace) -> int:
    """Plans the names, loads the model, generates, writes and reports."""
    from tdm_serve.validation import parse_size, seeds_for

    size = None if args.size is None else parse_size(args.size)
    repeated = [_text(prompt) for prompt in args.prompts for _ in range(args.n)]
    jobs = list(zip(repeated, seeds_for(args.seed, args.n, len(args.prompts)), strict=True))
    paths = output.plan(args.output, jobs)
    reports: list[dict[str, Any]] = []
    for path, image in zip(paths, _pictures(args, jobs, size), strict=True):
        output.make_folder(path.parent)
        write_atomically(path, image.png())
        reports.append(_report(path, image))
        if not args.json:
            print(f"{path}  seed {image.seed}, {image.nfe} NFE, {reports[-1]['ms']} ms{_notes(image)}", flush=True)
    if args.json:
        print(json.dumps({"images": reports} | reports[0]))
    return 0


def _text(prompt: str) -> str:
    """What can be told of a prompt before the seconds that loading a model takes: it has text, and it is text."""
    if not prompt.strip():
        raise InvalidRequest(f"the prompt {prompt!r} is empty; say what to draw", param="prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt {prompt!r} is not valid UTF-8", param="prompt") from error
    return prompt


def _pictures(
    args: argparse.Namespace, jobs: Sequence[output.Picture], size: tuple[int, int] | None
) -> Iterator[GeneratedImage]:
    """Loads the model, checks every request, then yields picture after picture."""
    from tdm_serve.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        adapters="fused" if args.adapter_scale is None else "separate",
        engine=args.engine,
        **options.memory_of(args),
    )
    requests = _requests(args, jobs, size, pipeline.info)
    for request in requests:
        pipeline.check(request)
    batches = [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]
    with Progress(len(batches)) as progress:
        for batch in batches:
            yield from pipeline.generate(batch, callback=progress.step)


def _requests(
    args: argparse.Namespace, jobs: Sequence[output.Picture], size: tuple[int, int] | None, info: ModelInfo
) -> list[Request]:
    """What the options ask of a model."""
    from tdm_serve.validation import weight_of

    width, height = size or (info.width, info.height)
    guidance = None if args.guidance_scale is None else weight_of(args.guidance_scale, info.guidance_off)
    return [
        Request(
            prompt,
            seed,
            width,
            height,
            steps=args.steps,
            guidance=guidance,
            allow_untrained_schedule=args.allow_untrained_schedule,
            truncate_prompt=args.truncate_prompt,
            adapter_scale=args.adapter_scale,
        )
        for prompt, seed in jobs
    ]


def _notes(image: GeneratedImage) -> str:
    """What a request allowed to happen, and did."""
    notes = {"untrained schedule": image.untrained_schedule, "prompt cut": image.truncated}
    return "".join(f", {note}" for note, happened in notes.items() if happened)


def _report(path: Path, image: GeneratedImage) -> dict[str, Any]:
    """One picture's line of JSON."""
    timings = {stage: round(ms, 1) for stage, ms in image.timings_ms.items()}
    return {"path": str(path), **image.recipe(), "ms": timings.get("total"), "timings_ms": timings}


class Progress:
    """A bar of steps on stderr, shown only at a terminal and only when the work takes a while."""

    def __init__(self, batches: int) -> None:
        from tqdm import tqdm

        self._batches = batches
        self._bar = tqdm(total=None, unit="step", leave=False, delay=QUIET_S, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def step(self) -> StepCallback:
        """The callback for `Pipeline.generate`."""

        def advance(event: StepEvent) -> None:
            self._bar.total = self._batches * event.total
            self._bar.update()

        return advance
