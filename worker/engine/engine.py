"""The engine's public face: pictures go in as requests and come out as events, many denoised at once.

One thread owns an engine: every method is called from it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest, Start, finish, latent_size
from models.tiling import TiledDecoding
from worker.engine import runner
from worker.engine.adapters import padded_rank
from worker.engine.bank import Bank
from worker.engine.events import (
    Event,
    LaneTicked,
    NotFiniteError,
    RowFailed,
    RowFinished,
    RowHandedBack,
    RowProgress,
    Span,
    Stage,
)
from worker.engine.memory import Ceiling, free_caches, is_device_lost, is_out_of_memory
from worker.engine.resident import ResidentModel
from worker.engine.resume import ResumeState
from worker.engine.scheduler import Lane, LaneKey, Row, Scheduler

Buckets = Callable[[LaneKey], Sequence[int]]
"""Batch sizes that a lane's forward pass may have; the largest is the lane's number of slots."""

_USUAL_AREA = 64 * 64  # latents of 512x512 pixels at f = 8


@dataclasses.dataclass(eq=False)
class _Picture:
    """A row's state outside its slot. `time` are its own time embeddings, if the model's table lacks them; `fed` is the
    last step whose inputs it has drawn. `decoding` is set after the last step, `latents` [1, z, h, w] with it."""

    row: Row
    request: PictureRequest
    resume: ResumeState | None
    start: Start | None = None
    time: Tensor | None = None
    step: int = 0
    fed: int = -1
    begun: float = 0.0
    denoised: float = 0.0
    decode_begun: float = 0.0
    previewed: float = 0.0
    latents: Tensor | None = None
    decoding: TiledDecoding | None = None


class Engine:
    """`batching`: "exact" never changes a lane's batch for lack of memory and needs `buckets` of equal bits, so that a
    picture is the same in any company; "fast" takes what fits. `capacity` bounds what is placed at once: pictures of up
    to 64x64 latents, larger ones counting by their area. `fingerprint` names all that a picture's bits depend on
    beside its request."""

    def __init__(
        self,
        models: Mapping[str, LatentDiffusion | ResidentModel],
        *,
        buckets: Sequence[int] | Buckets = (1, 2, 4, 8),
        batching: Literal["exact", "fast"] = "fast",
        capacity: float = 16,
        fingerprint: str = "",
        preview_seconds: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fixed = None if callable(buckets) else tuple(sorted(buckets))
        if (fixed is not None and (not fixed or fixed[0] < 1)) or capacity < 1:
            raise ValueError(f"buckets={fixed} and capacity={capacity}: expected numbers of at least 1")
        self._residents = {
            name: model if isinstance(model, ResidentModel) else ResidentModel(model) for name, model in models.items()
        }
        self._buckets: Buckets = buckets if callable(buckets) else lambda _: fixed or ()
        self._exact = batching == "exact"
        self._ceiling = Ceiling(capacity)
        self._fingerprint = fingerprint
        self._preview_seconds = preview_seconds
        self._clock = clock
        self._scheduler = Scheduler(lambda key: max(self._buckets(key)))
        self._banks: dict[LaneKey, Bank] = {}
        self._pictures: dict[str, _Picture] = {}
        self._shortages = dict.fromkeys(models, 0)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def idle(self) -> bool:
        return not self._pictures

    @property
    def shortages(self) -> Mapping[str, int]:
        """How often memory ran out so far, by model, whether a row was lost or not."""
        return self._shortages

    @property
    def free_slots(self) -> int:
        """Pictures of usual size for which there is room now; none while any row waits for a slot or for memory."""
        if self._scheduler.waiting_count:
            return 0
        return max(int(self._ceiling.value - self._scheduler.weight), 0 if self._pictures else 1)

    def submit(
        self,
        row_id: str,
        model: str,
        request: PictureRequest,
        priority: float = 1.0,
        resume: ResumeState | None = None,
    ) -> None:
        """The row waits for a slot. It goes on from `resume` if that has the engine's fingerprint and its size, else
        it begins anew. Raises ValueError for an unknown model, a used id, an upscale without picture, a condition
        that the model does not take, an adapter that it does not have."""
        if row_id in self._pictures:
            raise ValueError(f"row {row_id} is in the engine already")
        if model not in self._residents:
            raise ValueError(f"model {model} is not loaded; loaded: {', '.join(sorted(self._residents))}")
        resident = self._residents[model]
        height, width = latent_size(resident.model, request)
        rows = max(len(resident.model.conditions(request)), 1)
        rank = padded_rank(resident.model.unet, resident.model.uses(request))
        key = LaneKey(model, height, width, rows > 1, resident.model.blends(request), rank)
        # Proportional to the FLOPs of the denoising, near enough to compare rows of different lanes.
        share = request.strength if request.task in ("img2img", "inpaint") else 1.0
        ideal = request.steps * share * rows * height * width * resident.parameters
        weight = max(height * width / _USUAL_AREA, 1.0)
        row = Row(row_id, key, priority, self._clock(), max(ideal, 1.0), weight)
        if resume is not None and resume.fingerprint != self._fingerprint:
            resume = None
        try:
            self._scheduler.add(row)  # before it is known here: a new lane is probed, which may fail
        except Exception as error:
            self._ran_out(model, error)
            raise
        self._pictures[row_id] = _Picture(row, request, resume)
        self._forget_idle_lanes()

    @torch.inference_mode()
    def snapshot(self, row_id: str) -> ResumeState | None:
        """With what the row could go on elsewhere; None when it is not here or has not begun. A copy on the device."""
        picture = self._pictures.get(row_id)
        if picture is None:
            return None
        if picture.latents is not None:
            return ResumeState(self._fingerprint, picture.step, picture.latents[0].clone())
        if picture.start is None:
            return picture.resume
        slot = self._scheduler.lanes[picture.row.lane].slots.index(picture.row)
        bank = self._banks[picture.row.lane]
        clean = bank.clean[slot].clone() if picture.start.plan.has_history else None
        return ResumeState(self._fingerprint, picture.step, bank.x[slot].clone(), clean)

    @torch.inference_mode()
    def cancel(self, row_id: str) -> bool:
        """Drops the row wherever it is; False when it is not (or no longer) here."""
        if row_id not in self._pictures:
            return False
        self._drop(self._pictures[row_id])
        return True

    @torch.inference_mode()
    def tick(self) -> list[Event]:
        """One unit of work: rows move into free slots, then the lane that needs it most decodes a piece of a finished
        picture, if it has one, or takes one denoising step.

        Nothing that a single row does is raised from here; a lost device is.
        """
        events = self._place()
        lane = self._scheduler.next_lane(self._clock())
        if lane is None:
            return events
        return [*events, *(self._decode(lane) if lane.decoding else self._denoise(lane))]

    def _forget_idle_lanes(self, *, all_of_them: bool = False) -> None:
        for dropped in self._scheduler.forget_idle(keep_spare=not all_of_them):
            self._banks.pop(dropped, None)

    def _drop(self, picture: _Picture) -> None:
        key = picture.row.lane
        slot = self._scheduler.lanes[key].discard(picture.row)
        if slot is not None and key in self._banks:
            self._banks[key].clear(slot)
        del self._pictures[picture.row.id]

    def _fail(self, picture: _Picture, stage: Stage, error: Exception) -> RowFailed:
        self._drop(picture)
        return RowFailed(picture.row.id, stage, error)

    def _ran_out(self, model: str, error: Exception) -> bool:
        """Whether `error` says that memory ran out, which is counted."""
        if not is_out_of_memory(error):
            return False
        self._shortages[model] += 1
        return True

    def _make_room(self, picture: _Picture) -> list[Event]:
        """Hands every other row back, so that this one can try alone; nothing when it was alone."""
        others = [other for other in self._pictures.values() if other is not picture]
        if others:
            self._ceiling.ran_out(self._scheduler.weight)
        events: list[Event] = []
        for other in others:
            events.append(RowHandedBack(other.row.id, self.snapshot(other.row.id)))
            self._drop(other)
        self._free_memory()
        return events

    def _free_memory(self) -> None:
        self._forget_idle_lanes(all_of_them=True)
        free_caches()

    def _place(self) -> list[Event]:
        """Free slots take waiting rows; those whose preparation fails are reported."""
        events: list[Event] = []
        while (placed := self._scheduler.place_next(self._clock(), self._ceiling.value)) is not None:
            lane, slot, row = placed
            picture = self._pictures[row.id]
            picture.begun = picture.previewed = self._clock()
            try:
                self._admit(lane, slot, picture)
            except Exception as error:  # whatever it is, it concerns this row only
                if is_device_lost(error):
                    raise
                room = []
                if self._ran_out(lane.key.model, error):
                    room = self._make_room(picture)
                    self._banks.pop(lane.key, None)  # it may hold half of this row; all others have left it
                if not room:
                    events.append(self._fail(picture, "prepare", error))
                    continue
                lane.send_back(row)
                picture.start = None
                return [*events, *room]
        return events

    def _admit(self, lane: Lane, slot: int, picture: _Picture) -> None:
        resident = self._residents[lane.key.model]
        if lane.key not in self._banks:
            self._banks[lane.key] = Bank(resident, lane.key, len(lane.slots))
        bank, resume = self._banks[lane.key], picture.resume
        start, time = runner.admit(resident, bank, slot, picture.request)
        if resume is not None and runner.go_on(bank, slot, start, resume):
            picture.step = resume.step
        picture.start, picture.time = start, time
        if picture.step == len(start.plan.timesteps):
            self._leave_slot(lane, slot, picture)
        picture.resume = None

    def _leave_slot(self, lane: Lane, slot: int, picture: _Picture) -> None:
        """After the last step: on to the decoder."""
        bank = self._banks[lane.key]
        picture.denoised = self._clock()
        picture.latents = bank.x[slot : slot + 1].clone()
        picture.decoding = self._residents[lane.key.model].model.decoding(picture.latents)
        lane.discard(picture.row)
        lane.decoding.append(picture.row)
        bank.clear(slot)

    def _denoise(self, lane: Lane) -> list[Event]:
        bank = self._banks[lane.key]
        rows = {slot: self._pictures[row.id] for slot, row in enumerate(lane.slots) if row is not None}
        for slot, picture in rows.items():
            # A step that failed for lack of memory is tried again with the noise that it has drawn.
            if picture.start is not None and picture.fed != picture.step:
                runner.feed(bank, slot, picture.start, picture.time, picture.step)
                picture.fed = picture.step
        bucket = lane.bucket(self._buckets(lane.key))
        begun = self._clock()
        errors = self._step_as_one(lane, bucket) if self._exact else self._step(lane, slice(0, bucket))
        if errors is None:
            return self._make_room(self._pictures[lane.neediest(begun).id])
        events: list[Event] = [LaneTicked(lane.key, len(rows), bucket, self._clock() - begun)]
        for slot, picture in rows.items():
            if slot in errors:
                events.append(self._fail(picture, "denoise", errors[slot]))
            else:
                events += self._advance(lane, slot, picture)
        return events

    def _step_as_one(self, lane: Lane, bucket: int) -> dict[int, Exception] | None:
        """All rows or none, since a smaller batch has other bits. Errors by slot; None: it may work with more room."""
        for attempt in range(2):
            try:
                runner.step(self._residents[lane.key.model], self._banks[lane.key], slice(0, bucket))
                return {}
            except Exception as error:  # out of memory among others
                if is_device_lost(error):
                    raise
                self._ran_out(lane.key.model, error)
                if attempt == 0:
                    self._free_memory()
                elif len(self._pictures) == 1:
                    return {lane.occupied[0]: error}
        return None

    def _step(self, lane: Lane, rows: slice) -> dict[int, Exception]:
        """Steps all rows at once; if that fails, in halves, so that only rows that fail alone are named."""
        try:
            runner.step(self._residents[lane.key.model], self._banks[lane.key], rows)
        except Exception as error:  # out of memory among others
            if is_device_lost(error):
                raise
            self._ran_out(lane.key.model, error)
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
        steps = len(picture.start.plan.timesteps)
        preview = None
        if picture.step < steps and now - picture.previewed >= self._preview_seconds:
            picture.previewed = now
            preview = self._residents[lane.key.model].preview.draw(bank.clean[slot : slot + 1])
        events: list[Event] = [RowProgress(picture.row.id, picture.step, steps, preview)]
        if picture.step == steps:
            if not bank.x[slot].isfinite().all():
                detail = f"denoising ran out of range at guidance_scale={picture.request.guidance_scale:g}"
                return [*events, self._fail(picture, "denoise", NotFiniteError(detail))]
            self._leave_slot(lane, slot, picture)
        return events

    def _decode(self, lane: Lane) -> list[Event]:
        """One piece of the picture that waits longest; the picture, if it was the last piece."""
        picture = self._pictures[lane.decoding[0].id]
        assert picture.latents is not None
        assert picture.decoding is not None
        picture.decode_begun = picture.decode_begun or self._clock()
        try:
            picture.decoding.step()
            if not picture.decoding.done:
                return []
            image = finish(picture.request, picture.decoding.pixels)
        except Exception as error:  # concerns this row only
            if is_device_lost(error):
                raise
            room = self._make_room(picture) if self._ran_out(lane.key.model, error) else []
            if not room:
                return [self._fail(picture, "decode", error)]
            picture.decoding = self._residents[lane.key.model].model.decoding(picture.latents)
            return room
        self._drop(picture)
        self._ceiling.finished()
        denoise, decode = Span(picture.begun, picture.denoised), Span(picture.decode_begun, self._clock())
        return [RowFinished(picture.row.id, image, denoise, decode)]
