"""The sentences of the page. Whatever somebody typed is made harmless here before it meets HTML or Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdm_app.refusal import FULL, Refused
from tdm_serve import GeneratedImage, ModelInfo
from tdm_serve.errors import Cancelled, DeadlineUnreachable, OutputError, Overloaded, TdmServeError

if TYPE_CHECKING:
    from tdm_app.online.table import Training

BROKEN = "something broke on the server; its log says what. Please try again"


def heading(info: ModelInfo) -> str:
    """Title and one sentence about the model, as HTML."""
    about = f" {safe(info.description)}" if info.description else ""
    return (
        f'<header class="top"><h1>tdm-serve</h1><p><code>{safe(info.id)}</code> makes a picture in '
        f"{info.nfe} network evaluations.{about}</p></header>"
    )


def title(info: ModelInfo) -> str:
    """What stands over a picture where several checkpoints are on show, as HTML."""
    return f'<p class="title"><strong>{safe(info.id)}</strong> {safe(info.description)}</p>'


def caption(picture: GeneratedImage) -> str:
    """One line under a picture."""
    return f"seed {picture.seed} · {picture.nfe} NFE · {total_ms(picture):.0f} ms"


def table(pictures: Sequence[GeneratedImage]) -> str:
    """Where the time of the pictures went, as a Markdown table, one row each."""
    stages = [stage for stage in pictures[0].timings_ms if stage != "total"]
    head = ["picture", "seed", "NFE", *(f"{stage} ms" for stage in stages), "total ms"]
    rows = [head, ["---:"] * len(head)]
    for number, picture in enumerate(pictures, 1):
        times = [f"{picture.timings_ms[stage]:.1f}" for stage in stages]
        rows.append([str(number), str(picture.seed), str(picture.nfe), *times, f"{total_ms(picture):.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def total_ms(picture: GeneratedImage) -> float:
    """Milliseconds from the start of the picture to its pixels."""
    return picture.timings_ms.get("total", sum(picture.timings_ms.values()))


def progress(done: int, total: int, ahead: int, left_ms: float) -> str:
    """What the status line says while pictures are made."""
    left = f"about {seconds(left_ms)} left" if left_ms > 0 else "almost there"
    if done == 0 and ahead > 0:
        return f"{ahead} {'picture' if ahead == 1 else 'pictures'} ahead · {left}"
    return f"{done} of {total} evaluations · {left}" if total else f"Starting · {left}"


def opening(warming: bool) -> str:
    """What the status line says before anything is known."""
    return "The model is warming up; your pictures come as soon as it is done" if warming else "Starting"


def made(count: int, took_ms: float) -> str:
    """What the status line says when all is done. `took_ms` is what the visitor waited."""
    return f"{count} {'picture' if count == 1 else 'pictures'} in {seconds(took_ms)}"


def training(one: Training, step: int, steps: int) -> str:
    """How a training stands."""
    version, source = safe(one.version), f"{one.ratings} ratings of {safe(one.model)}"
    match one.status:
        case "running" if steps:
            return f"Training {version} from {source}: {step} of {steps} updates"
        case "running":
            return f"Training {version} from {source}: beginning"
        case "succeeded" if one.loaded:
            return f"{version} is served: choose it as checkpoint, or compare it"
        case "succeeded":
            return f"{version} is trained from {source}; load it to try it"
        case "cancelled":
            return f"The training of {version} was cancelled"
        case "interrupted":
            return f"The training of {version} was interrupted: {safe(one.error or '')}"
        case _:
            return f"The training of {version} has failed: {safe(one.error or '')}"


def trouble(error: Exception) -> str:
    """The sentence for what went wrong, as HTML; a refusal says when to come back."""
    if isinstance(error, Cancelled):
        return "Cancelled."
    said = safe(_reason(error)).rstrip(".")
    if isinstance(error, Overloaded) and not isinstance(error, DeadlineUnreachable):
        return f"The server is busy: {said}. Please try again in {seconds(error.retry_after_ms)}."
    return f"That did not work: {said}."


def _reason(error: Exception) -> str:
    """What the API would say, but for errors that it only gives a number to look up in the log."""
    match error:
        case Refused():
            return error.problem.message
        case OutputError():
            return FULL.message  # its own sentence names a path of the server
        case TdmServeError():
            return str(error)
        case _:
            return BROKEN


def seconds(ms: float) -> str:
    """A time for people: never zero, and no more digits than one can feel."""
    if ms < 950:
        return f"{max(0.1, math.ceil(ms / 100) / 10):.1f} s"
    return f"{math.ceil(ms / 1000)} s" if ms < 90_000 else f"{math.ceil(ms / 60_000)} min"


def safe(text: str) -> str:
    """Text that may quote what somebody typed, for the inside of HTML or Markdown; always one line."""
    one_line = " ".join(text.split())
    return "".join(f"&#{ord(char)};" if char in _SPECIAL else char for char in html.escape(one_line, quote=False))


_SPECIAL = "\\`*_{}[]()+-!|~$\"'"


def recipe_rows(recipe: dict[str, Any]) -> str:
    """A recipe as an HTML table, in its own order."""
    rows = (
        f"<tr><th>{safe(name.replace('_', ' '))}</th><td>{safe(_short(value))}</td></tr>"
        for name, value in recipe.items()
    )
    return f'<table class="recipe"><tbody>{"".join(rows)}</tbody></table>'


def _short(value: Any) -> str:
    return ", ".join(f"{one:.4g}" for one in value) if isinstance(value, list) else str(value)
