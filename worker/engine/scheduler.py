"""Which lane works next and which waiting row gets a free slot. Plain Python: no tensors, and the time comes in.

A row is one picture being denoised. A lane holds the rows that can share a forward pass, in numbered slots; a row keeps
its slot until its last step. Not choosing a lane is all the preemption there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class LaneKey:
    """What rows of one forward pass have in common; height and width are those of the latents."""

    model: str
    height: int
    width: int
    guided: bool

    @property
    def label(self) -> str:
        """Short name for metrics, unique within the model."""
        return f"{self.width}x{self.height}{' guided' if self.guided else ''}"


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """`ideal` is the time that the row would take alone, in any unit common to all rows; `submitted` in seconds."""

    id: str
    lane: LaneKey
    priority: float
    submitted: float
    ideal: float

    def stretch(self, now: float) -> float:
        """How much longer than ideal the row has taken so far, weighted by its priority."""
        return self.priority * (now - self.submitted) / self.ideal

    def urgency(self, now: float) -> float:
        """Orders the rows that wait for a slot: by age, which counts more at a higher priority."""
        return self.priority * (now - self.submitted)


class Lane:
    """Rows of one key on their way: waiting, then in a slot, then waiting to be decoded."""

    def __init__(self, key: LaneKey, slots: int) -> None:
        self.key = key
        self.waiting: list[Row] = []
        self.slots: list[Row | None] = [None] * slots
        self.decoding: list[Row] = []

    @property
    def occupied(self) -> list[int]:
        """Slots that hold a row, ascending."""
        return [slot for slot, row in enumerate(self.slots) if row is not None]

    @property
    def rows(self) -> Iterator[Row]:
        yield from self.waiting
        yield from (row for row in self.slots if row is not None)
        yield from self.decoding

    def place_next(self, now: float) -> tuple[int, Row] | None:
        """Moves the most urgent waiting row into the lowest free slot; None when there is no row or no slot."""
        if not self.waiting or None not in self.slots:
            return None
        row = max(self.waiting, key=lambda waiting: waiting.urgency(now))
        slot = self.slots.index(None)
        self.waiting.remove(row)
        self.slots[slot] = row
        return slot, row

    def bucket(self, buckets: Sequence[int]) -> int:
        """How many slots the next forward pass runs over: the smallest of `buckets` that reaches all occupied ones."""
        reach = self.occupied[-1] + 1
        return min(bucket for bucket in buckets if bucket >= reach)

    def discard(self, row: Row) -> int | None:
        """Takes the row out wherever it is; returns the slot that it frees."""
        for queue in (self.waiting, self.decoding):
            if row in queue:
                queue.remove(row)
                return None
        slot = self.slots.index(row)
        self.slots[slot] = None
        return slot


class Scheduler:
    """All lanes. Every lane has `slots` slots; of the idle lanes, the `spare` last made are kept."""

    def __init__(self, slots: int, spare: int = 8) -> None:
        self._slots = slots
        self._spare = spare
        self.lanes: dict[LaneKey, Lane] = {}

    def add(self, row: Row) -> None:
        """The row waits for a slot of its lane."""
        lane = self.lanes.setdefault(row.lane, Lane(row.lane, self._slots))
        lane.waiting.append(row)

    def next_lane(self, now: float) -> Lane | None:
        """The lane whose worst-off row has the highest stretch; None when nothing is to be done.

        Shortest work first would starve long rows, oldest first lets them block short ones: stretch does neither.
        """
        worst = {key: max((row.stretch(now) for row in lane.rows), default=None) for key, lane in self.lanes.items()}
        busy = {key: stretch for key, stretch in worst.items() if stretch is not None}
        return self.lanes[max(busy, key=lambda key: busy[key])] if busy else None

    def forget_idle(self) -> list[LaneKey]:
        """Drops idle lanes beyond the spare ones, oldest first; returns their keys, so that memory can be freed."""
        idle = [key for key, lane in self.lanes.items() if next(lane.rows, None) is None]
        dropped = idle[: max(len(idle) - self._spare, 0)]
        for key in dropped:
            del self.lanes[key]
        return dropped

    @property
    def row_count(self) -> int:
        return sum(1 for lane in self.lanes.values() for _ in lane.rows)

    @property
    def waiting_count(self) -> int:
        """Rows without a slot."""
        return sum(len(lane.waiting) for lane in self.lanes.values())
