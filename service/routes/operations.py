"""For those who run the service: alive, ready, figures. Open without a key; let a proxy keep them inside."""

import asyncio
from contextlib import suppress
from typing import Final, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from broker.connection import REDIS_UNAVAILABLE
from broker.store import ObjectMissingError, StoreError
from contract.errors import ErrorCode
from service import metrics
from service.problems import ProblemError
from service.routes.common import State, problems
from service.state import GatewayState

router = APIRouter(tags=["operations"])
_PATIENCE_SECONDS: Final = 2.0
_PROBE_KEY: Final = "outputs/readiness-probe"


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ready"] = "ready"
    models: dict[str, int] = Field(description="live workers of every known model", examples=[{"darkroom-small": 1}])


@router.get("/healthz")
@router.head("/healthz", include_in_schema=False)  # how some load balancers and monitors ask
async def healthz() -> Health:
    """The process answers; says nothing about Redis or the store."""
    return Health()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=problems(ErrorCode.STORE_UNAVAILABLE))
async def readyz(state: State) -> Readiness:
    """Whether jobs can be taken: Redis and the store answer. `models` tells which of them somebody works on."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            figures = await metrics.read_figures(state.broker)
    except (TimeoutError, *REDIS_UNAVAILABLE) as error:
        raise ProblemError(ErrorCode.BROKER_UNAVAILABLE, "Redis does not answer") from error
    await _probe_store(state)
    return Readiness(models=dict(figures.workers))


async def _probe_store(state: GatewayState) -> None:
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            with suppress(ObjectMissingError):  # "no such object" is an answer
                await state.broker.store.get_async(_PROBE_KEY)
    except (TimeoutError, StoreError) as error:
        raise ProblemError(ErrorCode.STORE_UNAVAILABLE, "the picture store does not answer") from error


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
)
async def show_metrics(state: State) -> Response:
    """Figures for Prometheus. Those of jobs come from Redis and are the same on every gateway: take the max."""
    return Response(await state.metrics.exposition(state.broker), headers={"Content-Type": metrics.CONTENT_TYPE})
