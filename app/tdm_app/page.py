"""The web page: a prompt box, a gallery, and under each picture its seed, NFE and milliseconds.

It calls the same engine as the API, in the same process, so pictures asked for here share batches with API
requests. It works offline: system fonts, no telemetry, nothing loaded from other hosts.
"""

from __future__ import annotations

import asyncio
import importlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdm_app.service import Service
from tdm_serve import GeneratedImage, ModelInfo
from tdm_serve.core import Request
from tdm_serve.errors import InvalidRequest, TdmServeError
from tdm_serve.validation import parse_size, seeds_for

if TYPE_CHECKING:
    from PIL import Image

MAX_ON_PAGE = 4
AT_ONCE = 16  # page visitors served at the same time; the others queue
WAITING = 256  # and at most so many of them
EXAMPLES = ["two red circles", "a blue ring left of a star", 'the word "CAT" in red', "four green triangles"]
ASPECTS = ((1, 1), (3, 2), (2, 3))


def build_page(service: Service) -> Any:
    """The page as gradio Blocks, not yet mounted."""
    gr: Any = importlib.import_module("gradio")  # Any: gradio makes its events at import time, types cannot follow
    with gr.Blocks(title="tdm-serve", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(heading(service.info))
        prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], autofocus=True, elem_id="prompt")
        with gr.Row():
            seed = gr.Textbox(label="Seed", placeholder="empty: random", max_lines=1, elem_id="seed")
            sizes = size_choices(service.info)
            size = gr.Dropdown(sizes, value=sizes[0], label="Size", allow_custom_value=True, elem_id="size")
            count = gr.Radio(list(range(1, MAX_ON_PAGE + 1)), value=1, label="Pictures", elem_id="count")
        button = gr.Button("Generate", variant="primary", elem_id="generate")
        problem = gr.Markdown(visible=False, elem_id="problem")
        gallery = gr.Gallery(
            label="Pictures", format="png", columns=MAX_ON_PAGE, interactive=False, elem_id="gallery",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        facts = gr.Markdown(elem_id="facts")
        if service.info.id.startswith("default"):
            gr.Examples(EXAMPLES, inputs=prompt, cache_examples=False)
        gr.on(
            [button.click, prompt.submit],
            _handler(service, gr),
            inputs=[prompt, seed, size, count],
            outputs=[problem, gallery, facts],
            concurrency_limit=AT_ONCE,
            api_visibility="private",
        )
    return blocks.queue(max_size=WAITING, api_open=False)


def _handler(service: Service, gr: Any) -> Any:
    """The event of the button: what to show in the error box, the gallery and the table."""

    async def generate(prompt: str, seed: str, size: str, count: int) -> tuple[Any, Any, str]:
        try:
            pictures = await service.generate(requests_of(prompt, seed, size, count))
        except TdmServeError as error:
            return gr.Markdown(f"**That did not work:** {_plain(str(error))}", visible=True), [], ""
        shown = await asyncio.gather(*(asyncio.to_thread(_with_recipe, picture) for picture in pictures))
        captions = [caption(picture) for picture in pictures]
        return gr.Markdown("", visible=False), list(zip(shown, captions, strict=True)), table(pictures)

    return generate


def requests_of(prompt: str, seed: str, size: str, count: int) -> list[Request]:
    """What the boxes of the page say, as engine requests. Raises InvalidRequest."""
    if count not in range(1, MAX_ON_PAGE + 1):
        raise InvalidRequest(f"the number of pictures is {count}; allowed here: 1 to {MAX_ON_PAGE}", param="n")
    width, height = parse_size(size)
    return [Request(prompt, one, width, height) for one in seeds_for(_seed(seed), count)]


def _seed(text: str) -> int | None:
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest(f"seed is {text!r}; allowed: a whole number, or nothing", param="seed") from None


def _with_recipe(picture: GeneratedImage) -> Image.Image:
    """The picture with its recipe attached; gradio keeps text chunks, so the downloaded file has them too."""
    from PIL import Image

    return Image.open(io.BytesIO(picture.png()))


def caption(picture: GeneratedImage) -> str:
    """One line under a picture."""
    return f"seed {picture.seed} · {picture.nfe} NFE · {_total(picture):.0f} ms"


def table(pictures: Sequence[GeneratedImage]) -> str:
    """The facts about the pictures as a Markdown table, one row each."""
    stages = [stage for stage in pictures[0].timings_ms if stage != "total"]
    head = ["picture", "seed", "NFE", *(f"{stage} ms" for stage in stages), "total ms"]
    rows = [head, ["---:"] * len(head)]
    for number, picture in enumerate(pictures, 1):
        times = [f"{picture.timings_ms[stage]:.1f}" for stage in stages]
        rows.append([str(number), str(picture.seed), str(picture.nfe), *times, f"{_total(picture):.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _total(picture: GeneratedImage) -> float:
    return picture.timings_ms.get("total", sum(picture.timings_ms.values()))


def heading(info: ModelInfo) -> str:
    """Title and one sentence about the model."""
    about = f" {_plain(info.description)}" if info.description else ""
    return f"# tdm-serve\n`{info.id}`: a picture in {info.nfe} network evaluations.{about}"


def size_choices(info: ModelInfo) -> list[str]:
    """The model's own size first, then other shapes of about the same area that it takes."""
    sizes = [(info.width, info.height)]
    area = info.width * info.height
    for across, down in ASPECTS:
        unit = (area / (across * down)) ** 0.5 / info.size_multiple
        shape = (round(across * unit) * info.size_multiple, round(down * unit) * info.size_multiple)
        if shape not in sizes and all(info.min_side <= side <= info.max_side for side in shape):
            sizes.append(shape)
    return [f"{width}x{height}" for width, height in sizes]


def _plain(text: str) -> str:
    """A sentence that may quote what somebody typed, safe inside Markdown."""
    return "".join(f"&#{ord(char)};" if char in "\\`*_{}[]()<>#+-!|&~$" else char for char in text)
