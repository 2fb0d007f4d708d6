"""The fence: one script checks that a job is still held as the caller believes, and only then runs a list of commands.

Who lost a job (its lease ran out, it was cancelled) so changes nothing, whatever it sends and however late. The fence
is the `execution` field of the job's own hash, absent while the job waits, together with RQ's status.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from redis import Redis
from redis.typing import EncodableT

from broker import rq_surface
from broker.connection import text
from broker.refusals import LUA_EVEN_IF_FULL
from contract import keys
from contract.spec import JobStatus

ANY: Final = "*"

# KEYS: RQ's job hash, our own. ARGV: status, execution ("*" any), mark, "1" to refuse where a stop is asked, the
# commands as JSON, and those arguments that JSON cannot hold. The mark tells a repetition of what went through from a
# late coming: redis-py repeats a call whose answer got lost.
_RUN: Final = (
    """
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return {'refused', ''} end
local execution, left, stop = unpack(redis.call('HMGET', KEYS[2], 'execution', 'left', 'stop'))
if ARGV[3] ~= '' and left == ARGV[3] then return {'done', status} end
if status ~= ARGV[1] or (ARGV[2] ~= '*' and (execution or '') ~= ARGV[2]) then return {'refused', status} end
if ARGV[4] == '1' and stop then return {'stopped', stop} end
"""
    + LUA_EVEN_IF_FULL
    + """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
for _, command in ipairs(cjson.decode(ARGV[5])) do
  for i, argument in ipairs(command) do
    if type(argument) == 'table' then
      command[i] = argument.at and string.format('%.6f', now + argument.at) or ARGV[5 + argument.bytes]
    end
  end
  redis.call(unpack(command))
end
return {'done', status}
"""
)


@dataclass(frozen=True, slots=True)
class At:
    """Stands for Redis' time at the transaction plus `seconds`, in Unix seconds."""

    seconds: float = 0.0


Command = tuple[EncodableT | At, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """`done`: the commands ran, now or in an earlier try. `stop`: refused, since the job is to be ended."""

    done: bool
    stop: str | None = None


class Fence:
    """Thread-safe."""

    def __init__(self, connection: Redis) -> None:
        self._script = connection.register_script(_RUN)

    def run(
        self,
        job_id: str,
        status: JobStatus,
        execution_id: str | None,
        commands: Sequence[Command],
        mark: str = "",
        unless_stopped: bool = False,
    ) -> Answer:
        """Runs all `commands` or none. `execution_id`: None for a job that waits, ANY for whoever holds it.

        With a `mark`, which the commands must write into the field `left`, the same call is done once and may be
        repeated.
        """
        conditions: list[EncodableT] = [rq_surface.status_name(status), execution_id or "", mark, int(unless_stopped)]
        arguments = [*conditions, *_encoded(commands)]
        outcome, value = self._script(keys=[rq_surface.job_key(job_id), keys.job(job_id)], args=arguments)
        stopped = text(outcome) == "stopped"
        return Answer(text(outcome) == "done", text(value) if stopped else None)


def _encoded(commands: Sequence[Command]) -> list[EncodableT]:
    """One document is packed in a fraction of the time that a hundred arguments take."""
    binary: list[EncodableT] = []

    def encode(argument: EncodableT | At) -> str | dict[str, float]:
        if isinstance(argument, At):
            return {"at": argument.seconds}
        if isinstance(argument, str):
            return argument
        if isinstance(argument, int | float):
            return repr(argument)
        binary.append(argument)
        return {"bytes": len(binary)}

    document = json.dumps([[encode(argument) for argument in command] for command in commands], ensure_ascii=False)
    return [document, *binary]
