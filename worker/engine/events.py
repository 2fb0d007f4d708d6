"""What the engine tells: one list of events per tick."""

from __future__ import annotations

import dataclasses
from typing import Literal

from PIL import Image

from worker.engine.resume import ResumeState
from worker.engine.scheduler import LaneKey

Stage = Literal["prepare", "denoise", "decode"]


@dataclasses.dataclass(frozen=True)
class LaneTicked:
    """One forward pass: `rows` occupied rows in a batch of `bucket`."""

    lane: LaneKey
    rows: int
    bucket: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class RowProgress:
    """`step` of `steps` are done; `preview` is as small as the latents."""

    row_id: str
    step: int
    steps: int
    preview: Image.Image | None


@dataclasses.dataclass(frozen=True)
class Span:
    """Begin and end of a stage, by the engine's clock."""

    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class RowFinished:
    row_id: str
    image: Image.Image
    denoise: Span
    decode: Span


@dataclasses.dataclass(frozen=True)
class RowFailed:
    """This row alone is lost. A ValueError in "prepare" says what is wrong with the request."""

    row_id: str
    stage: Stage
    error: Exception


@dataclasses.dataclass(frozen=True)
class RowHandedBack:
    """The engine has no room for the row, which is not to blame; `resume` lets it go on elsewhere (None: not begun)."""

    row_id: str
    resume: ResumeState | None


Event = LaneTicked | RowProgress | RowFinished | RowFailed | RowHandedBack


class NotFiniteError(ArithmeticError):
    """Denoising ran into infinity or NaN."""
