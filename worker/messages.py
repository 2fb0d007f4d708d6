"""What the worker's threads tell its main loop. Nothing but the main loop changes the state of jobs."""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from broker.stops import Stop
from broker.take import TakenJob
from contract.spec import PictureResult
from worker.engine.events import Span


@dataclass(frozen=True)
class Arrived:
    """A taken job with its input pictures by name."""

    job: TakenJob
    inputs: Mapping[str, Image.Image]


@dataclass(frozen=True)
class TakeEnded:
    """The answer to one request for jobs is complete."""


@dataclass(frozen=True)
class Stopped:
    """These executions are to be ended: cancelled, or past their deadline."""

    stops: Mapping[str, Stop]


@dataclass(frozen=True)
class Lost:
    """These executions have lost their jobs to other workers."""

    executions: frozenset[str]


@dataclass(frozen=True)
class Stored:
    """A finished picture is in the store."""

    execution_id: str
    picture: PictureResult
    span: Span


@dataclass(frozen=True)
class StoreFailed:
    """A finished picture could not be encoded or stored."""

    execution_id: str
    error: Exception


@dataclass(frozen=True)
class Broken:
    """A thread met an error that it does not understand: the worker must end, its leases bring the jobs back."""

    error: BaseException


@dataclass(frozen=True)
class Wake:
    """Nothing but a reason to look around: a signal came."""


Message = Arrived | TakeEnded | Stopped | Lost | Stored | StoreFailed | Broken | Wake
