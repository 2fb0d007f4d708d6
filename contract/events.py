"""What happens to a job, as its event stream tells it. The stream's entry id carries the time (milliseconds)."""

from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from contract.spec import Document, JobError, JobResult

TERMINAL_TYPES: Final = frozenset({"succeeded", "failed", "cancelled"})


class QueuedEvent(Document):
    """Submitted, or back in the queue because its worker died ("abandoned") or is stopping ("handed_back")."""

    type: Literal["queued"] = "queued"
    reason: Literal["submitted", "abandoned", "handed_back"] = "submitted"


class StartedEvent(Document):
    """A worker has admitted the job."""

    type: Literal["started"] = "started"
    execution_id: str
    worker: str


class ProgressEvent(Document):
    """`step` of `steps` denoising steps are done, the slowest picture's count for a job of several."""

    type: Literal["progress"] = "progress"
    step: int = Field(ge=0)
    steps: int = Field(ge=1)


class PreviewEvent(Document):
    """A newer preview of picture `index` lies under the preview key; the bytes never travel through the stream."""

    type: Literal["preview"] = "preview"
    index: int = Field(ge=0)
    step: int = Field(ge=0)
    content_type: str


class SucceededEvent(Document):
    type: Literal["succeeded"] = "succeeded"
    result: JobResult


class FailedEvent(Document):
    type: Literal["failed"] = "failed"
    error: JobError


class CancelledEvent(Document):
    type: Literal["cancelled"] = "cancelled"


JobEvent = (
    QueuedEvent | StartedEvent | ProgressEvent | PreviewEvent | SucceededEvent | FailedEvent | CancelledEvent
)  # discriminated by `type`
EVENT_ADAPTER: Final[TypeAdapter[JobEvent]] = TypeAdapter(Annotated[JobEvent, Field(discriminator="type")])


def parse_event(text: str | bytes) -> JobEvent:
    """Inverse of `event.model_dump_json()`; what a newer worker adds is left out."""
    return EVENT_ADAPTER.validate_json(text, extra="ignore")
