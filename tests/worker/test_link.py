"""The worker's side of the upkeep: a queue that no gateway looks after is kept too."""

import time
from queue import SimpleQueue

from redis import Redis

from broker.store import Store
from broker.worker_side import WorkerBroker
from contract import keys
from contract.settings import Settings
from worker.link import BrokerLink


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
