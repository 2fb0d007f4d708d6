"""Every Redis key and every store key, as functions. RQ's own keys (`rq:...`) stay in `broker.rq_surface`."""

import re
from hashlib import sha256
from typing import Final

from contract.spec import SPEC_MAJOR, Priority

_OUTPUT: Final = re.compile(r"outputs/([A-Za-z0-9_-]+)/[A-Za-z0-9_-]+/([0-9]+\.[a-z]+)")
ANONYMOUS: Final = "anonymous"  # stands for api_key_id None in keys


def queue_name(model: str, priority: Priority) -> str:
    """The RQ queue of one model and priority; the spec's major version keeps old workers off new jobs."""
    return f"darkroom:v{SPEC_MAJOR}:{model}:{priority.value}"


def queue_names(model: str) -> list[str]:
    """A model's queues in the order in which they are taken."""
    return [queue_name(model, priority) for priority in Priority]


def job(job_id: str) -> str:
    """Hash of what RQ's own job hash has no place for: times, execution, stop flag, warnings, result, error."""
    return f"darkroom:job:{job_id}"


def events(job_id: str) -> str:
    """Stream of the job's events."""
    return f"darkroom:events:{job_id}"


def preview(job_id: str) -> str:
    """The latest preview picture of a running job; overwritten, expires."""
    return f"darkroom:preview:{job_id}"


def progress(job_id: str) -> str:
    """Latest "step/steps" of a running job; apart from `job`, since transactions watch that one."""
    return f"darkroom:progress:{job_id}"


def resume(job_id: str) -> str:
    """Hash of picture index to resume state of an unfinished job, and "steps" done in them; opaque bytes."""
    return f"darkroom:resume:{job_id}"


def idempotency(api_key_id: str | None, idempotency_key: str) -> str:
    """Hash {body, job} of a used Idempotency-Key, scoped to the API key."""
    return f"darkroom:idempotency:{api_key_id or ANONYMOUS}:{sha256(idempotency_key.encode()).hexdigest()}"


def idempotency_claim(api_key_id: str | None, idempotency_key: str) -> str:
    """Token of the request that is on its way to the queue under this Idempotency-Key."""
    return idempotency(api_key_id, idempotency_key).replace(":idempotency:", ":idempotency-claim:", 1)


def jobs_of(api_key_id: str | None) -> str:
    """Sorted set of one API key's jobs by submit time."""
    return f"darkroom:jobs:{api_key_id or ANONYMOUS}"


def all_jobs() -> str:
    """Sorted set of every API key's jobs by submit time."""
    return "darkroom:all-jobs"


def waiting(api_key_id: str | None, model: str) -> str:
    """Set of one API key's queued and running jobs for a model; its size is capped at submit."""
    return f"darkroom:waiting:{model}:{api_key_id or ANONYMOUS}"


def line(queue: str, api_key_id: str | None) -> str:
    """List of one API key's jobs that wait in a queue and were never taken, the oldest first."""
    return f"{line_prefix(queue)}{api_key_id or ANONYMOUS}"


def line_prefix(queue: str) -> str:
    return f"darkroom:line:{queue}:"


def turns(queue: str) -> str:
    """Sorted set of the API keys that may have a line in a queue by the time of their last turn."""
    return f"darkroom:turns:{queue}"


def returned(queue: str) -> str:
    """List of waiting jobs that came back from a worker: they go on before others begin."""
    return f"darkroom:returned:{queue}"


def suspects(queue: str) -> str:
    """List of waiting jobs that must run alone, since workers died with them."""
    return f"darkroom:suspects:{queue}"


def suspect_claim(queue: str) -> str:
    """Name of the worker that drains in order to run the queue's next suspect."""
    return f"darkroom:suspect-claim:{queue}"


def last_take(worker_name: str) -> str:
    """What a worker took last, should the answer have got lost."""
    return f"darkroom:take:{worker_name}"


def rate(api_key_id: str | None) -> str:
    """Token bucket of one API key."""
    return f"darkroom:rate:{api_key_id or ANONYMOUS}"


def running_limits() -> str:
    """Hash of API key to the number of jobs that it may have in workers at once, of those that are limited so."""
    return "darkroom:running-limits"


def running(api_key_id: str | None) -> str:
    """Set of the running jobs of an API key so limited, and of some that ran: `take` drops those when it counts."""
    return f"{running_prefix()}{api_key_id or ANONYMOUS}"


def running_prefix() -> str:
    return "darkroom:running:"


def api_keys() -> str:
    """Hash of id to ApiKey JSON; revoked keys stay in it."""
    return "darkroom:api-keys"


def api_keys_version() -> str:
    """Another text after every change of `api_keys()`."""
    return "darkroom:api-keys-version"


def deadlines() -> str:
    """Sorted set of unfinished jobs by the time at which they expire."""
    return "darkroom:deadlines"


def leases() -> str:
    """Sorted set of running executions, `{job}:{execution}`, by the time at which their lease ends."""
    return "darkroom:leases"


def inputs_due() -> str:
    """Sorted set of ended jobs by the time at which their input pictures go."""
    return "darkroom:inputs-due"


def ended() -> str:
    """Sorted set of ended jobs by end time: the janitor's to-do list."""
    return "darkroom:ended"


def counters() -> str:
    """Hash of lifetime counters, written in the transactions that they count; fields by `counter`."""
    return "darkroom:counters"


def counter(metric: str, *labels: str) -> str:
    """Field of `counters()`: the metric's name and its label values in the metric's order, parted by "|"."""
    return "|".join((metric, *labels))


def cards() -> str:
    """Hash of model name to ModelCard JSON; outlives the workers."""
    return "darkroom:models"


def workers() -> str:
    """Sorted set of worker names by the time until which they count as live."""
    return "darkroom:workers"


def worker(name: str) -> str:
    """JSON of one worker's latest heartbeat."""
    return f"darkroom:worker:{name}"


def signing_keys() -> str:
    """Sorted set of the keys that sign picture URLs where the settings name none, by the time they were made."""
    return "darkroom:signing-keys"


def lock(name: str) -> str:
    """Leader lock, e.g. of the janitor."""
    return f"darkroom:lock:{name}"


def input_object(job_id: str, name: str) -> str:
    """Store key of an input picture."""
    return f"inputs/{job_id}/{name}.png"


def inputs_of(job_id: str) -> str:
    return f"inputs/{job_id}/"


def output_object(job_id: str, execution_id: str, index: int, extension: str) -> str:
    """Store key of a finished picture: apart per execution, so that a fenced-off worker overwrites nothing."""
    return f"outputs/{job_id}/{execution_id}/{index}.{extension}"


def outputs_of(job_id: str) -> str:
    return f"outputs/{job_id}/"


def file_name(key: str) -> str | None:
    """Under which name a finished picture is saved; None where `key` is not that of one."""
    picture = _OUTPUT.fullmatch(key)
    return f"{picture[1]}-{picture[2]}" if picture else None
