"""Which lane works next and which waiting row gets a free slot. Plain Python: no tensors, and the time comes in.

A row is one picture being denoised. A lane holds the rows that can share a forward pass, in numbered slots; a row keeps
its slot until its last step. Not choosing a lane is all the preemption there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class LaneKey:
    """What rows of one forward pass have in common; height and width are those of the latents. In a lane that `blends`
    what is kept of a picture is put back after every step. `rank` is that of its rows' adapters, padded; 0: none."""

    model: str
    height: int
    width: int
    guided: bool
    blends: bool = False
    rank: int = 0

    @property
    def label(self) -> str:
        """Short name for metrics, unique within the model."""
        kinds = {"guided": self.guided, "blended": self.blends, f"rank {self.rank}": self.rank}
        return " ".join([f"{self.width}x{self.height}", *(kind for kind, it_is in kinds.items() if it_is)])


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """`ideal` is the time that the row would take alone, in any unit common to all rows; `submitted` in seconds;
    `weight` the memory that it takes, 1 for a picture of usual size."""

    id: str
    lane: LaneKey
    priority: float
    submitted: float
    ideal: float
    weight: float = 1.0

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
        yield from self.placed

    def bucket(self, buckets: Sequence[int]) -> int:
        """How many slots the next forward pass runs over: the smallest of `buckets` that reaches all occupied ones."""
        reach = self.occupied[-1] + 1
        return min(bucket for bucket in buckets if bucket >= reach)

    @property
    def placed(self) -> Iterator[Row]:
        """Rows that take memory: all but the waiting ones."""
        yield from (row for row in self.slots if row is not None)
        yield from self.decoding

    def neediest(self, now: float) -> Row:
        """Of the rows in slots, of which there must be one."""
        return max((row for row in self.slots if row is not None), key=lambda row: row.stretch(now))

    def send_back(self, row: Row) -> None:
        """The row gives its slot up and waits for another."""
        self.slots[self.slots.index(row)] = None
        self.waiting.append(row)

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
    """All lanes. A lane has `slots(key)` slots; of the idle lanes, the `spare` last made are kept."""

    def __init__(self, slots: Callable[[LaneKey], int], spare: int = 8) -> None:
        self._slots = slots
        self._spare = spare
        self.lanes: dict[LaneKey, Lane] = {}

    def add(self, row: Row) -> None:
        """The row waits for a slot of its lane."""
        if row.lane not in self.lanes:
            self.lanes[row.lane] = Lane(row.lane, self._slots(row.lane))
        self.lanes[row.lane].waiting.append(row)

    def place_next(self, now: float, ceiling: float) -> tuple[Lane, int, Row] | None:
        """Moves the most urgent row whose lane has a free slot into the lowest one; None when there is none, or when it
        would bring the weight of all placed rows above `ceiling`. A row that is too heavy by itself comes in alone, and
        lighter ones do not overtake it for ever: they wait behind it."""
        waiting = [row for lane in self.lanes.values() if None in lane.slots for row in lane.waiting]
        if not waiting:
            return None
        row = max(waiting, key=lambda one: one.urgency(now))
        held = self.weight
        if held and held + row.weight > ceiling:
            return None
        lane = self.lanes[row.lane]
        slot = lane.slots.index(None)
        lane.waiting.remove(row)
        lane.slots[slot] = row
        return lane, slot, row

    def next_lane(self, now: float) -> Lane | None:
        """Of the lanes with placed rows, that whose worst-off row has the highest stretch; None when all is done.

        Shortest work first would starve long rows, oldest first lets them block short ones: stretch does neither.
        """
        busy = [lane for lane in self.lanes.values() if next(lane.placed, None) is not None]
        return max(busy, key=lambda lane: max(row.stretch(now) for row in lane.rows), default=None)

    def forget_idle(self, *, keep_spare: bool = True) -> list[LaneKey]:
        """Drops idle lanes, beyond the spare ones oldest first; returns their keys, so that memory can be freed."""
        idle = [key for key, lane in self.lanes.items() if next(lane.rows, None) is None]
        dropped = idle[: max(len(idle) - (self._spare if keep_spare else 0), 0)]
        for key in dropped:
            del self.lanes[key]
        return dropped

    @property
    def weight(self) -> float:
        """Of all placed rows."""
        return sum(row.weight for lane in self.lanes.values() for row in lane.placed)

    @property
    def waiting_count(self) -> int:
        """Rows without a slot."""
        return sum(len(lane.waiting) for lane in self.lanes.values())
