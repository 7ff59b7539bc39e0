"""`create_app`: an engine in, an ASGI app out. Routes, page, limits and error handlers are put together here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse

from tdm_app.access import Access
from tdm_app.docs_page import docs_page
from tdm_app.errors import install_error_handlers
from tdm_app.jobs import Jobs
from tdm_app.limits import BodyLimit, Limits
from tdm_app.metrics import Metrics
from tdm_app.online.trainer import OnlineTraining
from tdm_app.page_mount import mount_note, mount_page
from tdm_app.ratelimit import Limiter
from tdm_app.request_id import RequestId
from tdm_app.retention import forgetting
from tdm_app.routes.capabilities import capabilities_router
from tdm_app.routes.feedback import feedback_router
from tdm_app.routes.files import files_router
from tdm_app.routes.health import health_router
from tdm_app.routes.images import images_router
from tdm_app.routes.jobs import jobs_router
from tdm_app.routes.metrics import metrics_router
from tdm_app.routes.models import models_router
from tdm_app.routes.training import training_router
from tdm_app.security import install_security
from tdm_app.service import Service
from tdm_app.settings import Settings
from tdm_app.settings_sources import load
from tdm_app.state import State
from tdm_app.tracing import tracing_from_environment
from tdm_serve import AsyncEngine, __version__

DESCRIPTION = "Text to pictures in a few network evaluations, in the shape of OpenAI's Images API."


def create_app(
    engine: AsyncEngine, settings: Settings | None = None, state: State | None = None, *, page: bool = True
) -> FastAPI:
    """The service around one engine, which its lifespan starts and closes. `app.state.service` is the Service.

    `settings` come from the environment where none are given. `state` is what the service remembers, which its opener
    closes; without one everything is forgotten when the lifespan ends. Call `settings.bound_to` where others can reach
    the address: `auth` is off unless it is "on".
    """
    settings = settings or load()[0]
    memory = state or State.temporary()
    service = Service(engine, settings, memory)
    jobs, online = Jobs(service), OnlineTraining(service)
    metrics, tracing = Metrics(engine, jobs.counts), tracing_from_environment()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        with contextlib.closing(tracing), contextlib.nullcontext(memory) if state else contextlib.closing(memory):
            async with (
                forgetting(memory, service.store, settings),
                online.running(),
                jobs.running(),
                service.running(),
                page_lifespan,
            ):
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
    install_error_handlers(app)
    app.add_middleware(BodyLimit, limits=Limits(settings.max_body_bytes))
    limiter = install_security(app, settings, memory)
    app.add_middleware(Access, metrics=metrics, tracing=tracing)
    app.add_middleware(RequestId)  # added last, so it is the outermost and stamps the answers of all others
    for router in _routers(service, jobs, online, limiter, metrics):
        app.include_router(router)
    _add_docs(app)
    page_lifespan = mount_page(app, service, online) if page else _no_page(app)
    return app


def _routers(
    service: Service, jobs: Jobs, online: OnlineTraining, limiter: Limiter, metrics: Metrics
) -> list[APIRouter]:
    routers = [
        images_router(service, limiter),
        jobs_router(service, jobs, limiter),
        feedback_router(service.feedback),
        training_router(online),
        files_router(service.store),
        models_router(service),
        capabilities_router(service),
        health_router(service),
    ]
    return [*routers, metrics_router(metrics)] if service.settings.metrics else routers


def _add_docs(app: FastAPI) -> None:
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url)))

    app.add_api_route("/docs", docs, include_in_schema=False)


def _no_page(app: FastAPI) -> contextlib.AbstractAsyncContextManager[None]:
    mount_note(app)
    return contextlib.nullcontext()
