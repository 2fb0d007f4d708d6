"""Builds the gateway. Importing this does nothing; the lifespan connects."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from urllib.parse import urlsplit

import structlog
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from broker.connection import REDIS_UNAVAILABLE
from broker.gateway_side import JobBroker
from broker.store import Store, StoreError
from contract.settings import Settings
from service import openapi, problems, reference
from service.cors import cors_options
from service.metrics import GatewayMetrics
from service.middleware import BodyLimit, Defects, ProxyPrefix, RequestContext
from service.routes import generate, images, jobs, models, operations
from service.state import GatewayState

_log = structlog.get_logger("darkroom.gateway")


def create_app(settings: Settings, store: Store | None = None) -> FastAPI:
    """The ASGI app. Redis and the store may be away when it starts: it answers 503 until they are there. Without a
    `store` it opens the settings' own when it starts, and a store that answers and refuses ends the start."""
    metrics = GatewayMetrics()
    app = FastAPI(
        title="Darkroom",
        version=version("darkroom"),
        lifespan=_lifespan(settings, metrics, store),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    for module in (generate, jobs, images, models, operations):
        app.routes.extend(module.router.routes)  # FastAPI's own way wraps each in a router of its own
    openapi.install(app)
    reference.install(app)
    problems.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)  # the innermost: each is added around the others
    app.add_middleware(Defects)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors_options(settings.cors_origins))
    app.add_middleware(RequestContext, metrics=metrics)
    if prefix := urlsplit(settings.public_url or "").path.rstrip("/"):
        app.add_middleware(ProxyPrefix, prefix=prefix)
    return app


def _lifespan(
    settings: Settings, metrics: GatewayMetrics, store: Store | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        broker = JobBroker(settings, store or await asyncio.to_thread(open_store, settings))
        app.state.gateway = GatewayState(settings, broker, metrics)
        chores = [
            asyncio.create_task(_every(settings.reap_seconds, broker.sweep), name="darkroom-sweep"),
            asyncio.create_task(_every(settings.janitor_seconds, broker.clean), name="darkroom-janitor"),
        ]
        try:
            yield
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await broker.close()

    return lifespan


def open_store(settings: Settings) -> Store:
    """Raises `StoreRefusedError`: then a gateway does not start."""
    store = Store.of(settings)
    if (away := store.check()) is not None:
        _log.warning("store away", error=str(away))
    return store


async def _every(seconds: float, chore: Callable[[], Awaitable[object]]) -> None:
    """Goes on whatever happens: jobs must expire even after a surprise. Of an outage only the begin and the end are
    logged."""
    away = False
    while True:
        try:
            await chore()
            if away:
                _log.info("chore done again", chore=chore.__name__)
            away = False
        except (*REDIS_UNAVAILABLE, StoreError) as error:
            if not away:
                _log.warning("chore put off", chore=chore.__name__, error=str(error))
            away = True
        except Exception:  # noqa: BLE001 - logged with its traceback, and tried again
            _log.exception("chore failed", chore=chore.__name__)
        await asyncio.sleep(seconds)
