"""The supervisor's view of the broker: what becomes of the jobs of a child that died.

broker = SupervisorBroker(settings)
name = worker_side.worker_name()                  # given to the child, for its `WorkerBroker(..., name=name)`
broker.reap_worker(name)                          # after the child's death, once per child
broker.close()
"""

from broker.connection import connect
from broker.reap import Sweeper, Swept
from contract.settings import Settings


class SupervisorBroker:
    """Synchronous; one per supervisor process. Connects at first use, so it may be made before Redis is there."""

    def __init__(self, settings: Settings) -> None:
        self._redis = connect(settings.redis_url)
        self._sweeper = Sweeper(self._redis, settings)

    def reap_worker(self, name: str) -> Swept:
        """Puts all that the dead worker `name` held back into the queues at once, and takes it off every list.

        Only for a process that is known to be dead: a living one would lose its jobs, though the fences keep even that
        harmless. May be repeated; after it the name must not be used again. Raises `connection.REDIS_UNAVAILABLE`:
        call again once Redis is back, or leave it to the leases.
        """
        return self._sweeper.reap_worker(name)

    def close(self) -> None:
        self._redis.close()
