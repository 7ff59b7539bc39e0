"""The pictures of the page as HTML: the frame that waits, the preview that becomes clearer, the finished one.

Previews are tiny and travel inside the page's own messages; finished pictures are files, so that what is saved from
the browser is byte for byte what the API would have sent, recipe included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdm_app.encode import quick_png, text_of
from tdm_app.page.words import safe

if TYPE_CHECKING:
    from PIL import Image

    from tdm_app.page.keep import Kept

Strip = tuple[str, ...]  # addresses of the previews of one picture, in the order of its evaluations
SHOWN_IN_STRIP = 8  # frames at most; of more, evenly spaced ones


def address(preview: Image.Image) -> str:
    """A small picture as a data: address."""
    return f"data:image/png;base64,{text_of(quick_png(preview))}"


def empty() -> str:
    """A frame that waits for nothing."""
    words = "<span>Pictures appear here</span>"
    return f'<figure class="shot blank"><div class="pixels" style="aspect-ratio:1">{words}</div></figure>'


def waiting(width: int, height: int) -> str:
    """A frame in the shape of the picture to come."""
    return f'<figure class="shot live"><div class="pixels" style="{_shape(width, height)}"></div></figure>'


def preview(width: int, height: int, strip: Strip, step: int, total: int) -> str:
    """The predicted clean picture after evaluation `step` of `total`, with the earlier ones below."""
    newest = f'<img src="{strip[-1]}" alt="Preview after evaluation {step} of {total}">' if strip else ""
    badge = f'<span class="badge">{step}/{total}</span>'
    return (
        f'<figure class="shot live"><div class="pixels" style="{_shape(width, height)}">{newest}{badge}</div>'
        f'<div class="below">{_strip(strip)}</div></figure>'
    )


def finished(kept: Kept, title: str = "") -> str:
    """The picture, how it came about, its two files and its caption. `title` is HTML."""
    picture, name = kept.picture, safe(f"{kept.picture.prompt}, seed {kept.picture.seed}")
    source = f"gradio_api/file={kept.png}"
    kind = "shot done rateable" if kept.id is not None else "shot done"
    return (
        f'<figure class="{kind}">{title}<a class="pixels" style="{_shape(picture.width, picture.height)}" '
        f'href="{source}" target="_blank" title="Open the picture"><img src="{source}" alt="{name}"></a>'
        f'<div class="below">{_strip((*kept.strip, source) if kept.strip else ())}<span class="files">'
        f'<a href="{source}" download="{kept.png.name}">PNG</a>'
        f'<a href="gradio_api/file={kept.recipe}" download="{kept.recipe.name}">Recipe</a></span></div>'
        f"<figcaption>{safe(kept.caption)}</figcaption></figure>"
    )


def status(text: str, share: float | None = None, kind: str = "") -> str:
    """One line about what is going on, with a bar when `share` (0 to 1) is known. `text` is HTML."""
    bar = "" if share is None else f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>'
    return f'<div class="status {kind}">{bar}<span class="said">{text}</span></div>'


def alert(sentence: str) -> str:
    """What went wrong; `sentence` is HTML."""
    return f'<p role="alert">{sentence}</p>'


def _strip(strip: Strip) -> str:
    if len(strip) < 2:
        return ""
    frames = "".join(f'<img src="{one}" alt="">' for one in thinned(strip))
    return f'<div class="strip" aria-hidden="true">{frames}</div>'


def thinned(strip: Sequence[str]) -> Sequence[str]:
    """At most SHOWN_IN_STRIP frames, the first and the last among them."""
    if len(strip) <= SHOWN_IN_STRIP:
        return strip
    last = len(strip) - 1
    return [strip[round(place * last / (SHOWN_IN_STRIP - 1))] for place in range(SHOWN_IN_STRIP)]


def _shape(width: int, height: int) -> str:
    return f"aspect-ratio:{width}/{height}"
