"""The shipped worker, made faulty from outside: words of a prompt say what goes wrong with its picture.

"raise": its text cannot be encoded. "exhaust": there is no memory for that. "die": the process is killed at its second
step. Every step takes TICK_SECONDS.
"""

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor

from models.conditioning import Condition
from models.tasks import PictureRequest
from models.text import TextConditioner
from worker import child
from worker.engine.engine import Engine
from worker.engine.events import Event, RowProgress

TICK_SECONDS = float(os.environ.get("TICK_SECONDS", "0"))
_submit, _tick, _encode = Engine.submit, Engine.tick, TextConditioner.encode
_deadly: set[str] = set()


def submit(self: Engine, row_id: str, model: str, request: PictureRequest, *args: Any, **more: Any) -> None:
    if "die" in request.prompt:
        _deadly.add(row_id)
    _submit(self, row_id, model, request, *args, **more)


def tick(self: Engine) -> list[Event]:
    events = _tick(self)
    if events:
        time.sleep(TICK_SECONDS)
    if any(isinstance(event, RowProgress) and event.row_id in _deadly and event.step == 2 for event in events):
        os.kill(os.getpid(), signal.SIGKILL)
    return events


def encode(self: TextConditioner, condition: Condition) -> Tensor:
    if "raise" in str(condition):
        raise RuntimeError("injected")
    if "exhaust" in str(condition):
        raise torch.OutOfMemoryError("injected")
    return _encode(self, condition)


if __name__ == "__main__":
    Engine.submit, Engine.tick, TextConditioner.encode = submit, tick, encode  # type: ignore[method-assign]
    sys.exit(child.run())
