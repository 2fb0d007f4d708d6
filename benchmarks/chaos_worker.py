"""The shipped worker with named points at which `benchmarks.chaos` may kill it, wrapped from outside.

A file in the folder CHAOS_DIR, named after a point, kills the first worker that comes by. Every denoising step of a
picture adds a byte to the worker's own file there, which a kill cannot undo.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from broker.store import Store
from broker.worker_side import WorkerBroker
from worker import child
from worker.engine.engine import Engine
from worker.engine.events import Event, RowFinished, RowProgress

FOLDER: Final = Path(os.environ.get("CHAOS_DIR", "."))
POINTS: Final = (
    "taken", "begun", "step", "decoded", "before store", "after store", "after save", "after beat",
    "before finish", "after finish",
)  # fmt: skip


def at(point: str) -> None:
    with suppress(FileNotFoundError):
        (FOLDER / point).unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: type, name: str, before: str | None = None, after: str | None = None) -> None:
    """`after` is passed only when the call returned something."""
    call: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(call)
    def wrapped(*args: Any, **more: Any) -> Any:
        if before is not None:
            at(before)
        answer = call(*args, **more)
        if after is not None and answer != []:
            at(after)
        return answer

    setattr(owner, name, wrapped)


def count_steps() -> None:
    tick = Engine.tick
    steps = (FOLDER / f"steps-{os.getpid()}").open("ab", buffering=0)

    def counted(self: Engine) -> list[Event]:
        events = tick(self)
        if done := sum(isinstance(event, RowProgress) for event in events):
            steps.write(bytes(done))
            at("step")
        if any(isinstance(event, RowFinished) for event in events):
            at("decoded")
        return events

    Engine.tick = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    wrap(WorkerBroker, "take", after="taken")
    wrap(Engine, "submit", after="begun")
    wrap(Store, "put", before="before store", after="after store")
    wrap(WorkerBroker, "save_resume", after="after save")
    wrap(WorkerBroker, "heartbeat", after="after beat")
    wrap(WorkerBroker, "succeed", before="before finish", after="after finish")
    count_steps()
    sys.exit(child.run())
