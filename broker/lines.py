"""In which order waiting jobs are taken: API keys take turns, and what has been started goes on first.

RQ's list of a queue holds every waiting id, so that its tools and our limits count right, in the order of submission.
Beside it lie, per queue: one line per API key, a sorted set of the keys with a line by their last turn, a list of jobs
that came back from a worker, and one of suspects. An id counts as waiting while it stands in RQ's list; the script of
`take` drops what it finds elsewhere.
"""

from broker import rq_surface
from broker.fence import Command
from contract import keys


def came_back(queue: str, job_id: str, suspect: bool) -> list[Command]:
    """To the head of the queue."""
    first = keys.suspects(queue) if suspect else keys.returned(queue)
    return [("LPUSH", rq_surface.queue_key(queue), job_id), ("LPUSH", first, job_id)]


def gave_up(queue: str, job_id: str, owner: str) -> list[Command]:
    """A waiting job ends untaken."""
    lists = (rq_surface.queue_key(queue), keys.returned(queue), keys.suspects(queue), keys.line(queue, owner))
    return [("LREM", name, 0, job_id) for name in lists]
