"""From a request that is valid by itself to a job in the queue: model, limits, pictures, store, submit."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha256

import structlog

from broker.connection import REDIS_UNAVAILABLE
from broker.limits import SubmitRefusedError
from broker.store import Store, StoreError
from broker.submit import Submitted
from contract import keys
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.spec import JobSpec, Task
from service.normalise import build_spec, check_limits, check_pictures, choose_model
from service.problems import ProblemError
from service.schemas import PICTURE_FIELDS, PictureRequest, pictures_of
from service.state import GatewayState
from service.uploads import Picture


async def submit(
    state: GatewayState,
    task: Task,
    request: PictureRequest,
    caller: str | None,
    idempotency_key: str | None,
    request_id: str,
) -> Submitted:
    """A new job, or the one that the Idempotency-Key made before.

    Raises `ProblemError`, `SubmitRefusedError`, the broker's idempotency errors, `StoreError` and what Redis raises.
    """
    card = await _card(state, task, request)
    given = pictures_of(request)
    if given:
        await state.broker.check_limits(card.name, request.priority, caller, idempotency_key)
    pictures = await state.uploads.decode(given)
    check_pictures(task, request, pictures, card, state.settings)
    body = body_hash(task, request, pictures) if idempotency_key else None
    spec = build_spec(task, request, pictures, card, caller, time.time(), request_id)
    _tell(spec, state.settings.log_prompts)
    if not pictures:
        return await state.broker.submit(spec, idempotency_key, body)
    async with _alone(state, caller, idempotency_key):
        return await _store_and_submit(state, spec, pictures, idempotency_key, body)


async def _card(state: GatewayState, task: Task, request: PictureRequest) -> ModelCard:
    """The model's, which takes the request. The cards that this gateway knows may be a moment old: before it refuses
    anything, it asks Redis."""
    try:
        return _checked(state, task, request, await state.broker.known_cards())
    except ProblemError:
        return _checked(state, task, request, await state.broker.cards())


def _checked(state: GatewayState, task: Task, request: PictureRequest, cards: Sequence[ModelCard]) -> ModelCard:
    card = choose_model(cards, task, request)
    check_limits(task, request, card, state.settings)
    return card


def _tell(spec: JobSpec, log_prompts: bool) -> None:
    """In the request's line of the log."""
    said = {"prompt": spec.prompt} if log_prompts else {}
    structlog.contextvars.bind_contextvars(task=spec.task.value, model=spec.model, n=spec.n, **said)


@asynccontextmanager
async def _alone(state: GatewayState, caller: str | None, idempotency_key: str | None) -> AsyncIterator[None]:
    """Storing takes a while: of requests with the same Idempotency-Key one at a time does it, the others get a 409."""
    if idempotency_key is None:
        yield
        return
    claims = state.broker.claims
    token = await claims.claim(caller, idempotency_key)
    if token is None:
        detail = (
            "the first request with this Idempotency-Key is still storing its pictures; repeat this one in a moment"
        )
        raise ProblemError(ErrorCode.IDEMPOTENCY_CONFLICT, detail, headers={"Retry-After": "1"})
    try:
        yield
    finally:
        with suppress(*REDIS_UNAVAILABLE):  # it ends by itself
            await asyncio.shield(claims.release(caller, idempotency_key, token))


async def _store_and_submit(
    state: GatewayState,
    spec: JobSpec,
    pictures: Mapping[str, Picture],
    idempotency_key: str | None,
    body: str | None,
) -> Submitted:
    for name, picture in pictures.items():
        await state.broker.store.put_async(spec.inputs[name], picture.png, "image/png")
    try:
        submitted = await state.broker.submit(spec, idempotency_key, body)
    except SubmitRefusedError:
        await asyncio.to_thread(_forget_inputs, state.broker.store, spec)
        raise
    # After any other error the job may have been queued all the same: then its inputs stay, and else the janitor comes.
    if not submitted.created:
        await asyncio.to_thread(_forget_inputs, state.broker.store, spec)
    return submitted


def body_hash(task: Task, request: PictureRequest, pictures: Mapping[str, Picture]) -> str:
    """The same for the same request, sent as JSON or as a form; a seed that is drawn has no part in it."""
    fields = request.model_dump_json(exclude=set(PICTURE_FIELDS), exclude_unset=True)
    sources = [f"{name}={picture.source_sha256}" for name, picture in sorted(pictures.items())]
    return sha256("\n".join([task.value, fields, *sources]).encode()).hexdigest()


def _forget_inputs(store: Store, spec: JobSpec) -> None:
    with suppress(StoreError):  # the janitor comes
        store.delete_folder(keys.inputs_of(spec.id))
