"""From a request that is valid by itself to a job in the queue: model, limits, pictures, store, submit."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Final

import structlog

from broker.store import Store, StoreError
from broker.submit import SubmitRefusedError, Submitted
from contract import keys
from contract.spec import JobSpec, Task
from service.normalise import build_spec, check_limits, check_pictures, choose_model
from service.schemas import PICTURE_FIELDS, PictureRequest, pictures_of
from service.state import GatewayState
from service.uploads import Picture

_log: Final = structlog.get_logger("darkroom.jobs")


async def submit(
    state: GatewayState, task: Task, request: PictureRequest, caller: str | None, idempotency_key: str | None
) -> Submitted:
    """A new job, or the one that the Idempotency-Key made before.

    Raises `ProblemError`, `SubmitRefusedError`, `StoreError` and what Redis raises.
    """
    card = choose_model(await state.broker.cards(), task, request)
    check_limits(task, request, card, state.settings)
    pictures = await state.uploads.decode(pictures_of(request))
    check_pictures(task, request, pictures, card, state.settings)
    spec = build_spec(task, request, pictures, card, caller, time.time())
    for name, picture in pictures.items():
        await state.broker.store.put_async(spec.inputs[name], picture.png, "image/png")
    try:
        submitted = await state.broker.submit(
            spec, idempotency_key, body_hash(task, request, pictures) if idempotency_key else None
        )
    except SubmitRefusedError:
        await asyncio.to_thread(_forget_inputs, state.broker.store, spec)
        raise
    # After any other error the job may have been queued all the same: then its inputs stay, and else the janitor comes.
    if submitted.created:
        said = {"prompt": spec.prompt} if state.settings.log_prompts else {}
        _log.info("submitted", job=spec.id, task=task.value, model=spec.model, n=spec.n, key=caller, **said)
    else:
        await asyncio.to_thread(_forget_inputs, state.broker.store, spec)
    return submitted


def body_hash(task: Task, request: PictureRequest, pictures: Mapping[str, Picture]) -> str:
    """The same for the same request, sent as JSON or as a form; a seed that is drawn has no part in it."""
    fields = request.model_dump_json(exclude=set(PICTURE_FIELDS), exclude_unset=True)
    sources = [f"{name}={picture.source_sha256}" for name, picture in sorted(pictures.items())]
    return sha256("\n".join([task.value, fields, *sources]).encode()).hexdigest()


def _forget_inputs(store: Store, spec: JobSpec) -> None:
    if spec.inputs:
        with suppress(StoreError):  # the janitor comes
            store.delete_folder(keys.inputs_of(spec.id))
