"""The gateway's view of the broker: asynchronous, one object per gateway process, made inside its event loop.

    broker = JobBroker(settings)
    submitted = await broker.submit(spec, idempotency_key, body_hash)     # after the inputs have been stored
    async for streamed in broker.follow(submitted.job_id): ...
    await broker.close()

Methods may raise `connection.REDIS_UNAVAILABLE` (answer 503) and, where pictures are touched, `store.StoreError`.
Who may see a job is the caller's business: compare `record.spec.api_key_id`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from broker import catalogue, jobs
from broker.cancel import cancel
from broker.connection import connect, connect_async, text
from broker.events import START, StreamedEvent
from broker.finish import Finisher
from broker.hub import Hub
from broker.idempotency import Claims
from broker.janitor import Cleaned, Janitor, delete_job
from broker.jobs import JobPage, JobRecord
from broker.key_ring import KeyRing
from broker.limits import LimitCheck
from broker.queues import read_ages
from broker.reap import Sweeper, Swept
from broker.rq_surface import queue_key
from broker.signing import Signers, UrlSigner
from broker.store import Store
from broker.submit import Submitted, Submitter
from contract import keys
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobSpec, JobStatus, Priority

_CARDS_SECONDS: Final = 1.0


class JobBroker:
    """All that the gateway asks of Redis, and of the store where a job's pictures go with it."""

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        self.store = store or Store.of(settings)
        self._redis = connect_async(settings.redis_url)
        self._hub_redis = connect_async(settings.redis_url)
        self._sync_redis = connect(settings.redis_url)  # for what workers do as well; used in threads
        self.key_ring = KeyRing(self._redis, settings)
        self.claims = Claims(self._redis)
        self._cards: list[ModelCard] | None = None
        self._cards_at = 0.0
        self._signers = Signers(self._redis, settings)
        self._submitter = Submitter(self._redis, settings)
        self._limit_check = LimitCheck(self._redis, settings.max_queue_depth)
        self._hub = Hub(self._hub_redis)
        self._finisher = Finisher(self._sync_redis, settings)
        self._sweeper = Sweeper(self._sync_redis, settings)
        self._janitor = Janitor(self._sync_redis, self.store, settings)

    async def close(self) -> None:
        await self._hub.close()
        await self._hub_redis.aclose()
        await self._redis.aclose()
        self._sync_redis.close()

    async def ping(self) -> None:
        """Raises when Redis is away."""
        await self._redis.ping()

    async def check_limits(
        self, model: str, priority: Priority, api_key_id: str | None, idempotency_key: str | None
    ) -> None:
        """Raises the `limits.SubmitRefusedError` that a submit would meet now, before its pictures are looked at."""
        limits = await self.key_ring.limits_of(api_key_id)
        await self._limit_check(model, priority, api_key_id, idempotency_key, limits)

    async def submit(
        self, spec: JobSpec, idempotency_key: str | None = None, body_hash: str | None = None
    ) -> Submitted:
        """Queues the job, all or nothing. Raises `limits.SubmitRefusedError` (queue full, rate, key used otherwise).

        `body_hash` is of the request as it came, before a seed is drawn; given exactly with an `idempotency_key`. Where
        the answer is not `created`, or an error, the inputs stored for `spec.id` are the caller's to delete.
        """
        limits = await self.key_ring.limits_of(spec.api_key_id)
        return await self._submitter.submit(spec, idempotency_key, body_hash, limits)

    async def get(self, job_id: str) -> JobRecord | None:
        return await jobs.read_job(self._redis, job_id)

    async def list_jobs(
        self, api_key_id: str | None, status: JobStatus | None = None, limit: int = 20, cursor: str | None = None
    ) -> JobPage:
        """One API key's jobs, newest first. Raises `jobs.InvalidCursorError`."""
        return await jobs.list_jobs(self._redis, keys.jobs_of(api_key_id), status, limit, cursor)

    async def list_all_jobs(
        self, status: JobStatus | None = None, limit: int = 20, cursor: str | None = None
    ) -> JobPage:
        """Every API key's jobs, newest first. Raises `jobs.InvalidCursorError`."""
        return await jobs.list_jobs(self._redis, keys.all_jobs(), status, limit, cursor)

    async def cancel(self, job_id: str) -> JobStatus | None:
        """The status afterwards: cancelled, running (ends at its next step), or how it had ended; None: no such job."""
        return await asyncio.to_thread(cancel, self._sync_redis, self._finisher, job_id)

    async def delete(self, job_id: str) -> JobStatus | None:
        """Removes an ended job with its pictures. Returns the status found: not ended means nothing was removed."""
        return await asyncio.to_thread(delete_job, self._sync_redis, self.store, job_id)

    def follow(self, job_id: str, after: str = START) -> AsyncGenerator[StreamedEvent, None]:
        """The job's events behind id `after`, past and coming, up to the terminal one; see `hub.Hub.follow`.

        Close the iterator (`contextlib.aclosing`) when the client leaves.
        """
        return self._hub.follow(job_id, after)

    async def last_event_id(self, job_id: str) -> str:
        """Id of the latest event so far; `events.START` where none is kept. A snapshot read after it misses nothing."""
        latest = await self._redis.xrevrange(keys.events(job_id), count=1)
        return text(latest[0][0] or START) if latest else START

    @property
    def followers(self) -> int:
        return self._hub.followers

    async def wait(self, job_id: str, seconds: float) -> JobRecord | None:
        """The job as soon as it has ended, or as it stands after `seconds`."""
        try:
            async with asyncio.timeout(seconds), aclosing(self._hub.follow(job_id)) as events:
                async for _ in events:
                    pass
        except TimeoutError:
            pass
        return await self.get(job_id)

    async def preview(self, job_id: str) -> bytes | None:
        """The latest preview of a running job, encoded as its preview event says."""
        data = await self._redis.get(keys.preview(job_id))
        return data if isinstance(data, bytes) else None

    async def cards(self) -> list[ModelCard]:
        """All known models by name, with or without a live worker."""
        return await catalogue.read_cards(self._redis)

    async def known_cards(self) -> list[ModelCard]:
        """The same, up to a second old: before something is refused for a card, ask `cards`."""
        now = time.monotonic()
        if self._cards is None or now - self._cards_at > _CARDS_SECONDS:
            self._cards_at = now  # whoever comes meanwhile goes on with the old ones
            self._cards = await self.cards()
        return self._cards

    async def workers(self) -> list[catalogue.LiveWorker]:
        return await catalogue.read_workers(self._redis)

    async def counters(self) -> dict[str, int]:
        """Lifetime counters by `keys.counter(metric, *labels)`; the metrics are `contract.metrics.REDIS_COUNTERS`."""
        return {text(name): int(value) for name, value in (await self._redis.hgetall(keys.counters())).items()}

    async def queue_depths(self) -> dict[tuple[str, Priority], int]:
        """Waiting jobs of every known model and priority."""
        queues = [(card.name, priority) for card in await self.cards() for priority in Priority]
        pipeline = self._redis.pipeline(transaction=False)
        for model, priority in queues:
            pipeline.llen(queue_key(keys.queue_name(model, priority)))
        return dict(zip(queues, await pipeline.execute(), strict=True))

    async def queue_ages(self) -> dict[tuple[str, Priority], float]:
        """See `queues.read_ages`, for every known model."""
        return await read_ages(self._redis, [card.name for card in await self.cards()])

    async def running(self) -> int:
        """Executions that hold a lease."""
        return await self._redis.zcard(keys.leases())

    async def url_signer(self) -> UrlSigner:
        """Signs picture URLs where `store.signs` is False; the same keys in every gateway on this Redis."""
        return await self._signers.get()

    async def sweep(self) -> Swept:
        """Puts abandoned jobs back and fails expired ones; call every `reap_seconds`."""
        return await asyncio.to_thread(self._sweeper.sweep)

    async def clean(self) -> Cleaned:
        """Retention; call every `janitor_seconds`."""
        return await asyncio.to_thread(self._janitor.clean)
