"""The engine's public face: pictures go in as requests and come out as events, many denoised at once.

One thread owns an engine: every method is called from it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest, Start, finish, latent_size
from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import Lane, LaneKey, Row, Scheduler


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
    stage: Literal["prepare", "denoise", "decode"]
    error: Exception


Event = LaneTicked | RowProgress | RowFinished | RowFailed


class NotFiniteError(ArithmeticError):
    """Denoising ran into infinity or NaN."""


@dataclasses.dataclass(eq=False)
class _Picture:
    """A row's state outside its slot. `latents` [1, z, h, w] are set after the last step."""

    row: Row
    request: PictureRequest
    start: Start | None = None
    step: int = 0
    begun: float = 0.0
    denoised: float = 0.0
    previewed: float = 0.0
    latents: Tensor | None = None


class Engine:
    """`buckets` are the batch sizes that a forward pass may have, the largest being a lane's number of slots; a single
    entry fixes the shape. `capacity` bounds the rows asked for through `free_slots`."""

    def __init__(
        self,
        models: Mapping[str, LatentDiffusion],
        *,
        buckets: Sequence[int] = (1, 2, 4, 8),
        capacity: int = 16,
        preview_seconds: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not buckets or min(buckets) < 1 or capacity < 1:
            raise ValueError(f"buckets={tuple(buckets)} and capacity={capacity}: expected numbers of at least 1")
        self._residents = {name: ResidentModel(model) for name, model in models.items()}
        self._buckets = tuple(sorted(buckets))
        self._capacity = capacity
        self._preview_seconds = preview_seconds
        self._clock = clock
        self._scheduler = Scheduler(self._buckets[-1])
        self._banks: dict[LaneKey, Bank] = {}
        self._pictures: dict[str, _Picture] = {}

    @property
    def idle(self) -> bool:
        return not self._pictures

    @property
    def free_slots(self) -> int:
        """Rows that could be used now; none while any row waits for a slot of its lane."""
        return 0 if self._scheduler.waiting_count else max(self._capacity - len(self._pictures), 0)

    def submit(self, row_id: str, model: str, request: PictureRequest, priority: float = 1.0) -> None:
        """The row waits for a slot. Raises ValueError for an unknown model, a used id, an upscale without picture."""
        if row_id in self._pictures:
            raise ValueError(f"row {row_id} is in the engine already")
        if model not in self._residents:
            raise ValueError(f"model {model} is not loaded; loaded: {', '.join(sorted(self._residents))}")
        resident = self._residents[model]
        height, width = latent_size(resident.model, request)
        key = LaneKey(model, height, width, request.guided)
        # Proportional to the FLOPs of the denoising, near enough to compare rows of different lanes.
        share = request.strength if request.task in ("img2img", "inpaint") else 1.0
        ideal = request.steps * share * (2 if request.guided else 1) * height * width * resident.parameters
        row = Row(row_id, key, priority, self._clock(), max(ideal, 1.0))
        self._pictures[row_id] = _Picture(row, request)
        self._scheduler.add(row)
        for dropped in self._scheduler.forget_idle():
            self._banks.pop(dropped, None)

    @torch.inference_mode()
    def cancel(self, row_id: str) -> bool:
        """Drops the row wherever it is; False when it is not (or no longer) here."""
        if row_id not in self._pictures:
            return False
        self._drop(self._pictures[row_id])
        return True

    @torch.inference_mode()
    def tick(self) -> list[Event]:
        """One unit of work for the lane that needs it most: rows move into its free slots, then it decodes one finished
        picture, if there is one, or takes one denoising step. Nothing that a single row does is raised from here."""
        lane = self._scheduler.next_lane(self._clock())
        if lane is None:
            return []
        events = self._fill(lane)
        if lane.decoding:
            return [*events, self._decode(self._pictures[lane.decoding[0].id])]
        return [*events, *self._denoise(lane)] if lane.occupied else events

    def _drop(self, picture: _Picture) -> None:
        key = picture.row.lane
        slot = self._scheduler.lanes[key].discard(picture.row)
        if slot is not None and key in self._banks:
            self._banks[key].clear(slot)
        del self._pictures[picture.row.id]

    def _fail(self, picture: _Picture, stage: Literal["prepare", "denoise", "decode"], error: Exception) -> RowFailed:
        self._drop(picture)
        return RowFailed(picture.row.id, stage, error)

    def _fill(self, lane: Lane) -> list[Event]:
        """Free slots take waiting rows; those whose preparation fails are reported."""
        failed: list[Event] = []
        resident = self._residents[lane.key.model]
        while (placed := lane.place_next(self._clock())) is not None:
            slot, row = placed
            picture = self._pictures[row.id]
            picture.begun = picture.previewed = self._clock()
            try:
                if lane.key not in self._banks:
                    self._banks[lane.key] = Bank(resident, lane.key, len(lane.slots))
                picture.start = runner.admit(resident, self._banks[lane.key], slot, picture.request)
            except Exception as error:  # noqa: BLE001  # whatever it is, it concerns this row only
                failed.append(self._fail(picture, "prepare", error))
        return failed

    def _denoise(self, lane: Lane) -> list[Event]:
        bank = self._banks[lane.key]
        rows = {slot: self._pictures[row.id] for slot, row in enumerate(lane.slots) if row is not None}
        for slot, picture in rows.items():
            if picture.request.eta > 0 and picture.start is not None:
                bank.noise[slot] = picture.start.step_noise(picture.request.eta)[0]
        bucket = lane.bucket(self._buckets)
        begun = self._clock()
        errors = self._step(lane, slice(0, bucket))
        events: list[Event] = [LaneTicked(lane.key, len(rows), bucket, self._clock() - begun)]
        for slot, picture in rows.items():
            if slot in errors:
                events.append(self._fail(picture, "denoise", errors[slot]))
            else:
                events += self._advance(lane, slot, picture)
        return events

    def _step(self, lane: Lane, rows: slice) -> dict[int, Exception]:
        """Steps all rows at once; if that fails, in halves, so that only rows that fail alone are named."""
        try:
            runner.step(self._residents[lane.key.model], self._banks[lane.key], rows)
        except Exception as error:  # noqa: BLE001  # out of memory among others
            if rows.stop - rows.start == 1:
                return {rows.start: error}
            middle = (rows.start + rows.stop) // 2
            halves = (slice(rows.start, middle), slice(middle, rows.stop))
            tried = [half for half in halves if any(half.start <= slot < half.stop for slot in lane.occupied)]
            return {slot: error for half in tried for slot, error in self._step(lane, half).items()}
        return {}

    def _advance(self, lane: Lane, slot: int, picture: _Picture) -> list[Event]:
        """A row has taken a step: progress, and after the last one it leaves its slot for the decoder."""
        assert picture.start is not None
        bank, now = self._banks[lane.key], self._clock()
        picture.step += 1
        steps = len(picture.start.timesteps)
        preview = None
        if picture.step < steps and now - picture.previewed >= self._preview_seconds:
            picture.previewed = now
            preview = self._residents[lane.key.model].preview.draw(bank.clean[slot : slot + 1])
        events: list[Event] = [RowProgress(picture.row.id, picture.step, steps, preview)]
        if picture.step == steps:
            picture.denoised = now
            picture.latents = bank.x[slot : slot + 1].clone()
            if not picture.latents.isfinite().all():
                detail = f"denoising ran out of range at guidance_scale={picture.request.guidance_scale:g}"
                return [*events, self._fail(picture, "denoise", NotFiniteError(detail))]
            lane.discard(picture.row)
            lane.decoding.append(picture.row)
            bank.clear(slot)
        return events

    def _decode(self, picture: _Picture) -> Event:
        assert picture.latents is not None
        begun = self._clock()
        try:
            image = finish(self._residents[picture.row.lane.model].model, picture.request, picture.latents)
        except Exception as error:  # noqa: BLE001  # concerns this row only
            return self._fail(picture, "decode", error)
        self._drop(picture)
        denoise, decode = Span(picture.begun, picture.denoised), Span(begun, self._clock())
        return RowFinished(picture.row.id, image, denoise, decode)
