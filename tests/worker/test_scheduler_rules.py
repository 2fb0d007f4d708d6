"""What must hold whatever arrives, leaves or is sent back, in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.engine.scheduler import LaneKey, Row, Scheduler

LANES = [LaneKey("m", side, side, guided) for side in (8, 16) for guided in (False, True)]
SLOTS = 3


class Life(RuleBasedStateMachine):
    """Rows arrive, move into slots, take steps, are decoded, cancelled or sent back; time passes."""

    @initialize(ceiling=st.floats(1, 8))
    def begin(self, ceiling: float) -> None:
        self.scheduler = Scheduler(lambda _: SLOTS, spare=1)
        self.ceiling = ceiling
        self.now = 0.0
        self.rows: dict[str, Row] = {}
        self.slot_of: dict[str, int] = {}
        self.count = 0

    def drop(self, row: Row) -> None:
        self.scheduler.lanes[row.lane].discard(row)
        self.slot_of.pop(row.id, None)
        del self.rows[row.id]

    @rule(
        lane=st.sampled_from(LANES),
        priority=st.sampled_from([1.0, 4.0]),
        ideal=st.floats(0.1, 100),
        weight=st.sampled_from([1.0, 1.0, 4.0, 16.0]),
    )
    def arrive(self, lane: LaneKey, priority: float, ideal: float, weight: float) -> None:
        row = Row(str(self.count), lane, priority, self.now, ideal, weight)
        self.count += 1
        self.rows[row.id] = row
        self.scheduler.add(row)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def place(self) -> None:
        held = self.scheduler.weight
        waiting = [row for row in self.rows.values() if row.id not in self.slot_of and not self.decodes(row)]
        placed = self.scheduler.place_next(self.now, self.ceiling)
        if placed is None:
            return
        lane, slot, row = placed
        assert row in waiting
        assert lane.key == row.lane
        assert not held or held + row.weight <= self.ceiling
        self.slot_of[row.id] = slot

    def decodes(self, row: Row) -> bool:
        return row in self.scheduler.lanes[row.lane].decoding

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def take_the_last_step(self, data: st.DataObject) -> None:
        row = self.rows[data.draw(st.sampled_from(sorted(self.slot_of)))]
        lane = self.scheduler.lanes[row.lane]
        assert lane.discard(row) == self.slot_of.pop(row.id)
        lane.decoding.append(row)

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def send_back(self, data: st.DataObject) -> None:
        row = self.rows[data.draw(st.sampled_from(sorted(self.slot_of)))]
        self.scheduler.lanes[row.lane].send_back(row)
        del self.slot_of[row.id]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Cancelled, failed or decoded."""
        self.drop(self.rows[data.draw(st.sampled_from(sorted(self.rows)))])

    @rule(keep=st.booleans())
    def forget(self, keep: bool) -> None:
        dropped = self.scheduler.forget_idle(keep_spare=keep)
        assert not {row.lane for row in self.rows.values()} & set(dropped)
        assert keep or {row.lane for row in self.rows.values()} == set(self.scheduler.lanes)

    @invariant()
    def every_row_is_in_one_place_and_keeps_its_slot(self) -> None:
        found: list[str] = []
        for lane in self.scheduler.lanes.values():
            found += [row.id for row in lane.rows]
            for slot in lane.occupied:
                row = lane.slots[slot]
                assert row is not None
                assert self.slot_of[row.id] == slot
        assert sorted(found) == sorted(self.rows)

    @invariant()
    def the_next_lane_has_the_worst_off_row(self) -> None:
        lane = self.scheduler.next_lane(self.now)
        placed = [row for one in self.scheduler.lanes.values() for row in one.placed]
        if lane is None:
            assert not placed
            return
        busy = {row.lane for row in placed}
        assert lane.key in busy
        worst = max(row.stretch(self.now) for row in self.rows.values() if row.lane in busy)
        assert worst == max(row.stretch(self.now) for row in lane.rows)

    @invariant()
    def work_goes_on_while_there_are_rows(self) -> None:
        """Whoever places and steps for long enough is done: nothing waits for something that never comes."""
        if self.rows and not self.scheduler.weight:
            assert self.scheduler.place_next(self.now, self.ceiling) is not None
            self.slot_of = {
                row.id: slot
                for lane in self.scheduler.lanes.values()
                for slot, row in enumerate(lane.slots)
                if row is not None
            }

    def teardown(self) -> None:
        for _ in range(20 * len(self.rows) + 1 if hasattr(self, "rows") else 0):
            self.now += 1.0
            while (placed := self.scheduler.place_next(self.now, self.ceiling)) is not None:
                self.slot_of[placed[2].id] = placed[1]
            lane = self.scheduler.next_lane(self.now)
            if lane is None:
                break
            self.drop(lane.decoding[0] if lane.decoding else lane.neediest(self.now))
        assert not getattr(self, "rows", {})


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
