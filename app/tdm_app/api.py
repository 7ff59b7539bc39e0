"""`create_app`: an engine in, an ASGI app out. Routes, page, limits and error handlers are put together here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from tdm_app.docs_page import docs_page
from tdm_app.errors import install_error_handlers
from tdm_app.limits import BodyLimit, Limits
from tdm_app.page_mount import mount_note, mount_page
from tdm_app.request_id import RequestId
from tdm_app.routes.health import health_router
from tdm_app.routes.images import images_router
from tdm_app.routes.models import models_router
from tdm_app.service import Service
from tdm_app.settings import Settings
from tdm_app.settings_sources import load
from tdm_serve import AsyncEngine, __version__

DESCRIPTION = "Text to pictures in a few network evaluations, in the shape of OpenAI's Images API."


def create_app(engine: AsyncEngine, settings: Settings | None = None, *, page: bool = True) -> FastAPI:
    """The service around one engine, which its lifespan starts and closes. `app.state.service` is the Service."""
    settings = settings or load()[0]
    service = Service(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with service.running(), page_lifespan:
            yield

    app = FastAPI(
        title="tdm-serve",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for router in (images_router(service), models_router(service), health_router(service)):
        app.include_router(router)
    _add_docs(app)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, limits=Limits(settings.max_body_bytes))
    app.add_middleware(RequestId)  # added last, so it is the outermost and stamps the answers of all others
    page_lifespan = mount_page(app, service) if page else _no_page(app)
    return app


def _add_docs(app: FastAPI) -> None:
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url)))

    app.add_api_route("/docs", docs, include_in_schema=False)


def _no_page(app: FastAPI) -> contextlib.AbstractAsyncContextManager[None]:
    mount_note(app)
    return contextlib.nullcontext()
