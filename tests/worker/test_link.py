"""The worker's side of the upkeep: a queue that no gateway looks after is kept too."""

import time
from queue import SimpleQueue

import structlog
from redis import Redis

from broker.store import Store
from broker.worker_side import WorkerBroker
from contract import keys
from contract.settings import Settings
from worker.link import BrokerLink
from worker.messages import Message


def test_workers_keep_the_retention_times_where_no_gateway_runs(settings: Settings, redis_client: Redis) -> None:
    settings = settings.model_copy(update={"janitor_seconds": 0.05})
    store = Store(settings.store_url)
    link = BrokerLink(WorkerBroker(settings, [], slots=1), store, settings, SimpleQueue())
    store.put("outputs/old/x/0.png", b"png", "image/png")
    redis_client.zadd(keys.ended(), {"old": 1.0})
    link.start(lambda: False)
    while redis_client.zcard(keys.ended()):
        time.sleep(0.02)
    link.close()
    assert list(store.list("outputs/")) == []


def test_a_record_that_makes_no_sense_ends_no_worker(settings: Settings, redis_client: Redis) -> None:
    """A job whose last words nobody understands must not take every worker with it."""
    settings = settings.model_copy(update={"lease_seconds": 0.1, "reap_seconds": 0.02})
    redis_client.hset("rq:job:odd", "status", "started")
    redis_client.set(keys.progress("odd"), "no/numbers")
    redis_client.zadd(keys.leases(), {"odd:execution": 1.0})
    inbox: SimpleQueue[Message] = SimpleQueue()
    link = BrokerLink(WorkerBroker(settings, [], slots=1), Store(settings.store_url), settings, inbox)
    with structlog.testing.capture_logs() as logs:
        link.start(lambda: False)
        while not any(line["event"] == "sweep failed" for line in logs):
            time.sleep(0.02)
        link.close()
    assert inbox.empty()
