"""A job's event stream: written under the fence of the execution, read by id."""

from dataclasses import dataclass
from typing import Any, Final, Self

from redis import Redis
from redis.typing import EncodableT

from broker.connection import text
from broker.refusals import LUA_EVEN_IF_FULL
from contract import keys
from contract.events import TERMINAL_TYPES, JobEvent, parse_event

MAX_EVENTS: Final = 256
START: Final = "0-0"
PREVIEW_SECONDS: Final = 600

# A worker that lost its job must not recreate the stream of a job that has ended.
_PUBLISH: Final = (
    LUA_EVEN_IF_FULL
    + """
local job, events, progress, preview = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
if redis.call('HGET', job, 'execution') ~= ARGV[1] then return 0 end
redis.call('XADD', events, 'MAXLEN', ARGV[3], '*', 'event', ARGV[2])
if ARGV[4] ~= '' then redis.call('SET', progress, ARGV[4]) end
if ARGV[5] ~= '' then redis.call('SET', preview, ARGV[5], 'EX', ARGV[6]) end
return 1
"""
)


@dataclass(frozen=True, slots=True)
class StreamedEvent:
    """An event with its place: `id` orders the stream and serves as Last-Event-ID; `at` is Unix time in seconds."""

    id: str
    event: JobEvent

    @property
    def at(self) -> float:
        return event_order(self.id)[0] / 1000

    @property
    def terminal(self) -> bool:
        return self.event.type in TERMINAL_TYPES


def event_order(event_id: str) -> tuple[int, int]:
    """Sort key of an id. Raises ValueError for anything that is not "milliseconds" or "milliseconds-number"."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or "0")


def parse_entry(entry: Any) -> StreamedEvent:
    """One (id, fields) pair as redis-py returns it from XRANGE and XREAD."""
    event_id, fields = entry
    return StreamedEvent(text(event_id), parse_event(fields[b"event"]))


def added_event(job_id: str, event: JobEvent) -> tuple[EncodableT, ...]:
    """Unfenced: the command for a transaction that holds the fence itself."""
    return ("XADD", keys.events(job_id), "MAXLEN", MAX_EVENTS, "*", "event", event.model_dump_json())


@dataclass(frozen=True, slots=True)
class Progress:
    """The value of a job's progress key: `step` of `steps` of its slowest picture; `total` steps of all together."""

    step: int
    steps: int
    total: int

    def __str__(self) -> str:
        return f"{self.step}/{self.steps}/{self.total}"

    @classmethod
    def parse(cls, value: bytes | str) -> Self:
        return cls(*map(int, text(value).split("/")))


class Publisher:
    """Writes events of running executions; those of an execution that lost its job vanish."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._script = connection.register_script(_PUBLISH)

    def publish(
        self, job_id: str, execution_id: str, event: JobEvent, progress: str = "", preview: bytes = b""
    ) -> bool:
        """False: the execution is no longer the job's."""
        names = [keys.job(job_id), keys.events(job_id), keys.progress(job_id), keys.preview(job_id)]
        arguments: list[EncodableT] = [
            execution_id,
            event.model_dump_json(),
            MAX_EVENTS,
            progress,
            preview,
            PREVIEW_SECONDS,
        ]
        return bool(self._script(keys=names, args=arguments))
