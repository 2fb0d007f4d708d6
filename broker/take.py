"""How a worker gets jobs: one script moves ids out of the queues and starts them, so that none is ever in between.

Its answer may get lost: the jobs are then held under a token that the worker's next call repeats, and come again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from redis import Redis
from redis.typing import EncodableT

from broker import resume, rq_surface
from broker.connection import text
from broker.events import MAX_EVENTS
from broker.refusals import LUA_EVEN_IF_FULL
from contract import keys
from contract.events import StartedEvent
from contract.spec import JobSpec

_REMEMBER_SECONDS: Final = 60
_EXECUTION: Final = "@"

# KEYS: leases, deadlines, last take, then per queue, in the order of taking: RQ's list, turns, returned, suspects,
# claim. ARGV: slots, lease seconds, worker, token, "1" for an empty worker, time for RQ, event, then per queue: name,
# prefix of its lines. Answers {now, job...}, a job being {id, queue, execution, data, created_at, suspect, resume}.
_TAKE: Final = (
    f"""
local RQ_JOB, JOB = '{rq_surface.job_key("")}', '{keys.job("")}'
local EVENTS, RESUME = '{keys.events("")}', '{keys.resume("")}'
local RUNNING_LIMITS, RUNNING = '{keys.running_limits()}', '{keys.running_prefix()}'
local MAX_EVENTS, REMEMBER = {MAX_EVENTS}, {_REMEMBER_SECONDS}
{rq_surface.LUA_START}
"""
    + LUA_EVEN_IF_FULL
    + """
local leases, deadlines, last = KEYS[1], KEYS[2], KEYS[3]
local slots, lease_seconds, worker, token = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local empty, stamp, event = ARGV[5] == '1', ARGV[6], ARGV[7]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local queues = {}
for k = 4, #KEYS, 5 do
  local i = #queues
  queues[i + 1] = {list = KEYS[k], turns = KEYS[k + 1], returned = KEYS[k + 2], suspects = KEYS[k + 3],
    claim = KEYS[k + 4], name = ARGV[8 + 2 * i], line = ARGV[9 + 2 * i]}
end
local answer, started = {string.format('%.6f', now)}, {}

local function tell(id, queue, execution)
  local own = redis.call('HMGET', JOB .. id, 'created_at', 'suspect')
  answer[#answer + 1] = {id, queue, execution, redis.call('HGET', RQ_JOB .. id, 'data'), own[1], own[2],
    redis.call('HGETALL', RESUME .. id)}
end

local function start(queue, id)
  if redis.call('HGET', RQ_JOB .. id, 'status') ~= 'queued' then return false end
  local execution = token .. '-' .. (#started + 1)
  rq_start(id, queue.name, execution, worker, now, stamp)
  redis.call('ZADD', leases, string.format('%.6f', now + lease_seconds), id .. ':' .. execution)
  redis.call('HSET', JOB .. id, 'execution', execution, 'started_at', string.format('%.6f', now), 'worker', worker)
  redis.call('XADD', EVENTS .. id, 'MAXLEN', MAX_EVENTS, '*', 'event', (string.gsub(event, '@', execution, 1)))
  local deadline = redis.call('HGET', JOB .. id, 'deadline')
  if deadline then redis.call('ZADD', deadlines, deadline, id) else redis.call('ZREM', deadlines, id) end
  local owner = redis.call('HGET', JOB .. id, 'owner')
  if owner and redis.call('HEXISTS', RUNNING_LIMITS, owner) == 1 then redis.call('SADD', RUNNING .. owner, id) end
  started[#started + 1] = {id, queue.name}
  tell(id, queue.name, execution)
  return true
end

local function done()
  if #started > 0 then redis.call('SET', last, cjson.encode({token = token, jobs = started}), 'EX', REMEMBER) end
  return answer
end

-- Whether as many jobs of this API key run as may.
local function is_busy(owner)
  local most = tonumber(redis.call('HGET', RUNNING_LIMITS, owner) or math.huge)
  if redis.call('SCARD', RUNNING .. owner) < most then return false end
  for _, id in ipairs(redis.call('SMEMBERS', RUNNING .. owner)) do
    if redis.call('HGET', RQ_JOB .. id, 'status') ~= 'started' then redis.call('SREM', RUNNING .. owner, id) end
  end
  return redis.call('SCARD', RUNNING .. owner) >= most
end

-- The API key whose turn it is, of those with jobs in line that may start; and whether one was passed over.
local function whose_turn(queue)
  local passed = 0
  while true do
    local owner = redis.call('ZRANGE', queue.turns, passed, passed)[1]
    if not owner then return nil, passed > 0 end
    if redis.call('EXISTS', queue.line .. owner) == 0 then
      redis.call('ZREM', queue.turns, owner)
    elseif is_busy(owner) then
      passed = passed + 1
    else
      return owner, passed > 0
    end
  end
end

-- What came back first, then the API key whose last turn is longest ago, then what RQ's own tools put into the list.
local function next_id(queue)
  while true do
    local id, owner, passed = redis.call('LPOP', queue.returned), nil, false
    if not id then
      owner, passed = whose_turn(queue)
      if owner then
        id = redis.call('LPOP', queue.line .. owner)
      elseif passed then
        return nil
      else
        return redis.call('LPOP', queue.list)
      end
    end
    if id and redis.call('LREM', queue.list, 1, id) == 1 then
      if owner then redis.call('ZADD', queue.turns, string.format('%.6f', now + #started / 1000000), owner) end
      return id
    end
  end
end

local before = redis.call('GET', last)
if before then
  before = cjson.decode(before)
  if before.token == token then
    for i, job in ipairs(before.jobs) do
      local execution = token .. '-' .. i
      if redis.call('HGET', JOB .. job[1], 'execution') == execution then tell(job[1], job[2], execution) end
    end
    if #answer > 1 then return answer end
    redis.call('DEL', last)  -- all have gone on without us
  end
end

-- A suspect goes to a worker that is empty. Where all are busy, the first that comes by claims it and drains.
for _, queue in ipairs(queues) do
  if empty then
    local id = redis.call('LPOP', queue.suspects)
    while id do
      if redis.call('LREM', queue.list, 1, id) == 1 and start(queue, id) then return done() end
      id = redis.call('LPOP', queue.suspects)
    end
  elseif redis.call('EXISTS', queue.suspects) == 1 then
    local claimant = redis.call('GET', queue.claim)
    if not claimant or claimant == worker then
      redis.call('SET', queue.claim, worker, 'PX', math.ceil(lease_seconds * 1000))
      return answer
    end
  end
end

for _, queue in ipairs(queues) do
  while #started < slots do
    local id = next_id(queue)
    if not id then break end
    start(queue, id)
  end
end
return done()
"""
)


@dataclass(frozen=True, slots=True, eq=False)
class TakenJob:
    """A job that this worker holds: `execution_id` is the fence, `queued_seconds` how long it has waited in all.

    `resume` has what an earlier execution saved, by picture index (absent: from the beginning). `alone`: workers died
    with this job, so it must run with no other in the worker.
    """

    spec: JobSpec
    execution_id: str
    queued_seconds: float
    resume: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    alone: bool = False

    @property
    def job_id(self) -> str:
        return self.spec.id


@dataclass(frozen=True, slots=True)
class UnreadableJob:
    """A started job whose spec this worker cannot read; to be failed."""

    job_id: str
    queue: str
    execution_id: str
    reason: str


class Taker:
    """Takes the jobs of the given models: by priority, among models of one priority in turn."""

    def __init__(
        self, connection: Redis, worker_name: str, queues: Sequence[Sequence[str]], lease_seconds: float
    ) -> None:
        """`queues` has RQ's queue names by model, for each priority."""
        self._script = connection.register_script(_TAKE)
        self._worker_name = worker_name
        self._lease_seconds = lease_seconds
        self._last = keys.last_take(worker_name)
        rounds = max((len(models) for models in queues), default=0)
        self._orders = [
            [queue for models in queues for queue in (*models[i:], *models[:i])] for i in range(rounds)
        ]  # fmt: skip
        self._event = StartedEvent(execution_id=_EXECUTION, worker=worker_name).model_dump_json()
        self._round = 0
        self._token = uuid4().hex

    def take(self, slots: int, empty: bool) -> list[TakenJob | UnreadableJob]:
        """Up to `slots` jobs, started in RQ, leased, with their started events written.

        `empty`: the worker holds no job. Only then it may get a suspect, and then nothing else; where a suspect waits
        and every worker is busy, one of them gets nothing until it is empty.
        """
        if not self._orders:
            return []
        queues = self._orders[self._round % len(self._orders)]
        names = [keys.leases(), keys.deadlines(), self._last, *(key for queue in queues for key in _keys(queue))]
        arguments: list[EncodableT] = [
            slots, self._lease_seconds, self._worker_name, self._token, int(empty), rq_surface.timestamp(), self._event,
            *(part for queue in queues for part in (queue, keys.line_prefix(queue))),
        ]  # fmt: skip
        now, *jobs = self._script(keys=names, args=arguments)
        if jobs:
            self._token = uuid4().hex
            self._round += 1
        return [_parse(job, float(now)) for job in jobs]


def _keys(queue: str) -> Iterable[str]:
    return (
        rq_surface.queue_key(queue),
        keys.turns(queue),
        keys.returned(queue),
        keys.suspects(queue),
        keys.suspect_claim(queue),
    )


def _parse(job: Sequence[Any], now: float) -> TakenJob | UnreadableJob:
    job_id, queue, execution_id, data, created_at, suspect, saved = job
    try:
        spec = rq_surface.stored_spec(data or b"")
    except ValueError as error:
        return UnreadableJob(text(job_id), text(queue), text(execution_id), str(error))
    waited = max(0.0, now - float(created_at or now))
    states = resume.parse(dict(zip(saved[::2], saved[1::2], strict=True)))
    return TakenJob(spec, text(execution_id), waited, states, suspect == b"1")
