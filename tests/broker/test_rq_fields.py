"""The job's hash that our script writes is the one that RQ itself would write."""

import json
from collections.abc import Callable
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from broker import rq_surface
from broker.gateway_side import JobBroker
from contract import keys
from contract.settings import Settings
from contract.spec import JobSpec

_TIMES = {"created_at", "enqueued_at"}


async def test_the_hash_of_a_new_job_is_rqs(
    settings: Settings, redis_client: Redis, make_spec: Callable[..., JobSpec]
) -> None:
    spec = make_spec(prompt='quotes " and \\ and ü, %s')
    gateway = JobBroker(settings)
    await gateway.submit(spec)
    await gateway.close()
    ours: Any = redis_client.hgetall(rq_surface.job_key(spec.id))
    queue = Queue(keys.queue_name(spec.model, spec.priority), connection=redis_client, serializer=JSONSerializer)
    theirs = queue.enqueue_call(
        rq_surface.JOB_FUNCTION,
        args=(json.loads(spec.to_json()),),
        timeout=-1,
        description=f"{spec.task} {spec.model}",
    )
    wanted = redis_client.hgetall(theirs.key)
    assert set(ours) == set(wanted)
    for name in set(ours) - {b"data", *(time.encode() for time in _TIMES)}:
        assert ours[name] == wanted[name], name
    read = Job.fetch(spec.id, connection=redis_client, serializer=JSONSerializer)
    assert (read.func_name, read.args, read.kwargs) == (theirs.func_name, list(theirs.args), theirs.kwargs)
    assert read.created_at == read.enqueued_at
    assert rq_surface.stored_spec(ours[b"data"]) == spec
