"""Resume states: what half-done pictures need to go on elsewhere. Opaque bytes here; the engine writes and reads them.

One hash per job, picture index to state. It goes in the transaction that ends the job.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from redis import Redis
from redis.typing import EncodableT

from contract import keys
from contract.settings import Settings
from contract.spec import JobSpec

# Beyond the longest wait in a queue: whoever forgets to delete a state, Redis does.
_BACKSTOP_SECONDS: Final = 3600
STEPS: Final = "steps"  # the field beside the states

# KEYS: job, resume; ARGV: execution, seconds, then field and value alternating.
_SAVE: Final = """
if redis.call('HGET', KEYS[1], 'execution') ~= ARGV[1] then return 0 end
if #ARGV > 2 then
  redis.call('HSET', KEYS[2], unpack(ARGV, 3))
  redis.call('EXPIRE', KEYS[2], ARGV[2])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class SavedWork:
    """Saved states by picture index, and how many denoising steps, summed over the job's pictures, they hold."""

    states: Mapping[int, bytes] = field(default_factory=dict)
    steps: int = 0


def parse(fields: Mapping[bytes, bytes]) -> dict[int, bytes]:
    """The states in the job's hash."""
    return {int(name): state for name, state in fields.items() if name.isdigit()}


class ResumeStore:
    """Writes states within the bound of `settings.max_resume_bytes` per job."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self._script = connection.register_script(_SAVE)
        self._limit = settings.max_resume_bytes
        self._seconds = int(settings.queue_deadline_seconds) + _BACKSTOP_SECONDS

    def save(self, spec: JobSpec, execution_id: str, work: SavedWork) -> bool:
        """Replaces the states of the pictures given. False: the execution is no longer the job's."""
        names = [keys.job(spec.id), keys.resume(spec.id)]
        return bool(self._script(keys=names, args=[execution_id, self._seconds, *self._bounded(spec, work)]))

    def commands(self, spec: JobSpec, work: SavedWork) -> list[tuple[EncodableT, ...]]:
        """The same, unfenced: for a transaction that holds the fence itself."""
        fields = self._bounded(spec, work)
        if not fields:
            return []
        key = keys.resume(spec.id)
        return [("HSET", key, *fields), ("EXPIRE", key, self._seconds)]

    def _bounded(self, spec: JobSpec, work: SavedWork) -> list[EncodableT]:
        """Field and value alternating; nothing where one state exceeds its picture's share of the bound: such a job
        begins again rather than fill Redis."""
        if not work.states or any(len(state) > self._limit // spec.n for state in work.states.values()):
            return []
        states = (part for index, state in work.states.items() for part in (str(index), state))
        return [STEPS, work.steps, *states]
