"""The HTTP side: OpenAI's paths, vLLM's beside them, and what an operator needs.

This module knows nothing about how tokens are made; it hands requests to the engine and its tokens to clients.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.routing import Mount, Route

import molora
from molora.serving import chat, completions, models, tokenizing
from molora.serving.config import ServeConfig
from molora.serving.errors import UnavailableError, add_error_handlers
from molora.serving.page import add_page
from molora.serving.protocol import ErrorBody
from molora.serving.request_log import LogRequests
from molora.serving.security import AnswerCancelled, AnswerHead, LimitBody, RequireKey, SafeHeaders
from molora.serving.service import AdapterLoader, Service, TheService

if TYPE_CHECKING:
    from molora.serving.engine import Engine
    from molora.serving.tracing import Tracer

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str


def create_app(
    engine: Engine, config: ServeConfig, *, loader: AdapterLoader | None = None, tracer: Tracer | None = None
) -> FastAPI:
    """The server of one bank: its base, its router and each of its adapters are the models that it offers.

    The engine stays the caller's: it is not closed when the app ends. A tracer is closed.

    Args:
        loader: what loads and unloads adapters; None is the engine itself.

    Raises:
        ValueError: two models would have the same name.
    """
    service = Service(engine, config, engine if loader is None else loader)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()
        if tracer is not None:
            tracer.close()

    app = FastAPI(
        title="MoLoRA",
        version=molora.__version__,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        docs_url=None,  # FastAPI's pages load scripts from elsewhere; page.py has one that does not
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    add_error_handlers(app)
    app.add_middleware(LimitBody, max_body_bytes=config.limits.max_body_bytes, max_body_s=config.limits.max_body_s)
    app.add_middleware(AnswerCancelled)
    app.add_middleware(RequireKey, keys=config.api_keys)
    app.add_middleware(SafeHeaders)
    app.add_middleware(AnswerHead)
    routers = [chat.router, completions.router, models.router, tokenizing.router, router]
    for each in routers:
        app.include_router(each)
    add_page(app)
    known = [*app.routes, *(route for each in routers for route in each.routes)]
    app.add_middleware(
        LogRequests, paths={route.path for route in known if isinstance(route, Route | Mount)}, tracer=tracer
    )
    return app


@router.get("/health")
async def health() -> Health:
    """The process answers."""
    return Health()


@router.get("/ready")
async def ready(service: TheService) -> Health:
    """Requests are served at full speed; 503 while the engine warms up, and once it stops."""
    if not service.engine.is_ready:
        raise UnavailableError("the engine is not ready")
    return Health()


@router.get("/metrics", response_class=Response)
async def metrics(service: TheService) -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> Version:
    return Version(version=molora.__version__)
