"""The web page: generate, compare, rate, and a history, over the same engine and queue as the API.

It runs in the same process, so pictures asked for here share batches with API requests. It works offline: system
fonts, no telemetry, nothing loaded from other hosts. One module per tab; `stage` is what they share.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tdm_app.online.trainer import OnlineTraining
from tdm_app.page.compare_tab import compare_tab
from tdm_app.page.generate_tab import generate_tab
from tdm_app.page.history_tab import history_tab
from tdm_app.page.keep import Tabs
from tdm_app.page.rate_tab import rate_tab
from tdm_app.page.stage import NOW, Page
from tdm_app.page.words import heading
from tdm_app.ratelimit import Limiter
from tdm_app.service import Service

WAITING = 256  # visitors whose events may queue behind those that are served
CSS = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")

__all__ = ["CSS", "SCRIPT", "build_page"]


def build_page(service: Service, online: OnlineTraining, limiter: Limiter | None = None) -> Any:
    """The page as gradio Blocks, not yet mounted. `limiter` counts its pictures as it counts the API's."""
    gr: Any = importlib.import_module("gradio")
    page = Page(gr, service, online, Tabs(_folder), limiter)
    both = page.several and page.places > 1
    rates = service.feedback.on and page.places > 1
    with gr.Blocks(title="tdm-serve", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        page.markup(heading(service.info))
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                target = generate_tab(page)
            with gr.Tab("Compare", id="compare", visible=both):
                if both:
                    compare_tab(page)
            with gr.Tab("Rate", id="rate", visible=rates) as rating:
                if rates:
                    rate_tab(page, rating.select)
            with gr.Tab("History", id="history") as history:
                history_tab(page, tabs, "generate", target, history.select)
        if online.on:  # versions may have joined since the page was made
            blocks.load(page.versions, None, page.choosers, **NOW)
        blocks.unload(page.visitor(_closer(page)))
    return blocks.queue(max_size=WAITING, api_open=False)


def _closer(page: Page) -> Any:
    def close(request: Any) -> None:
        page.tabs.close(request.session_hash)

    return close


def _folder() -> Path:
    """Where gradio may serve files from; asked for late, as mounting chooses it."""
    from gradio.utils import get_upload_folder

    return Path(get_upload_folder())
