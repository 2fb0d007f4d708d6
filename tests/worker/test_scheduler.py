"""The scheduling policy, without tensors or clocks."""

from worker.engine.scheduler import LaneKey, Row, Scheduler

SMALL = LaneKey("m", 8, 8, guided=True)
LARGE = LaneKey("m", 32, 32, guided=True)


def row(
    name: str,
    lane: LaneKey = SMALL,
    submitted: float = 0.0,
    ideal: float = 1.0,
    priority: float = 1.0,
    weight: float = 1.0,
) -> Row:
    return Row(name, lane, priority, submitted, ideal, weight)


def test_nothing_to_do() -> None:
    scheduler = Scheduler(lambda _: 2)
    assert scheduler.next_lane(now=1.0) is None
    only = row("a")
    scheduler.add(only)
    scheduler.lanes[SMALL].discard(only)
    assert scheduler.next_lane(now=1.0) is None


def test_the_lane_with_the_highest_stretch_ticks_next() -> None:
    scheduler = Scheduler(lambda _: 2)
    scheduler.add(row("long", LARGE, submitted=0.0, ideal=10.0))
    scheduler.add(row("short", SMALL, submitted=4.0, ideal=1.0))

    def chosen(now: float) -> LaneKey:
        while scheduler.place_next(now, ceiling=9.0):
            pass
        lane = scheduler.next_lane(now)
        assert lane is not None
        return lane.key

    assert chosen(4.1) == LARGE  # 0.41 against 0.1
    assert chosen(5.0) == SMALL  # 0.5 against 1.0: the short row has suffered more
    scheduler.add(row("urgent", LARGE, submitted=4.0, ideal=10.0, priority=20.0))
    assert chosen(5.0) == LARGE


def test_a_short_row_does_not_wait_for_all_steps_of_long_ones() -> None:
    """Ticks of a second each: one row of 50, one of 5 that comes later."""
    scheduler = Scheduler(lambda _: 2)
    left = {"long": 50, "short": 5}
    rows = {"long": row("long", LARGE, 0.0, ideal=50.0), "short": row("short", SMALL, 10.0, ideal=5.0)}
    scheduler.add(rows["long"])
    ended: dict[str, float] = {}
    now = 0.0
    while left:
        if now == 10.0:
            scheduler.add(rows["short"])
        scheduler.place_next(now, ceiling=9.0)
        lane = scheduler.next_lane(now)
        assert lane is not None
        name = next(iter(lane.rows)).id
        now += 1.0
        left[name] -= 1
        if left[name] == 0:
            del left[name]
            lane.discard(rows[name])
            ended[name] = now
    assert ended["short"] - 10.0 <= 2 * 5
    assert ended["long"] == 55.0


def test_oldest_rows_fill_the_lowest_free_slots_and_priority_weighs_age() -> None:
    scheduler = Scheduler(lambda _: 3)
    for waiting in (row("new", submitted=3.0), row("old", submitted=1.0), row("middle", submitted=2.0)):
        scheduler.add(waiting)
    lane = scheduler.lanes[SMALL]
    placed = [scheduler.place_next(5.0, ceiling=9.0) for _ in range(3)]
    assert [(slot, one.id) for _, slot, one in filter(None, placed)] == [(0, "old"), (1, "middle"), (2, "new")]
    scheduler.add(row("patient", submitted=3.0))
    scheduler.add(row("urgent", submitted=4.0, priority=4.0))
    assert scheduler.place_next(5.0, ceiling=9.0) is None
    occupant = lane.slots[1]
    assert occupant is not None
    assert lane.discard(occupant) == 1
    found = scheduler.place_next(5.0, ceiling=9.0)
    assert found is not None
    assert (found[1], found[2].id) == (1, "urgent")
    assert scheduler.waiting_count == 1
    assert len(list(lane.rows)) == 4


def test_rows_are_placed_up_to_a_weight_and_a_heavy_one_is_not_overtaken() -> None:
    scheduler = Scheduler(lambda _: 8)
    for one in (row("a", submitted=1.0), row("heavy", LARGE, submitted=2.0, weight=5.0), row("b", submitted=3.0)):
        scheduler.add(one)

    def placed() -> str | None:
        found = scheduler.place_next(9.0, ceiling=3.0)
        return found and found[2].id

    assert [placed(), placed()] == ["a", None]
    first = scheduler.lanes[SMALL].slots[0]
    assert first is not None
    scheduler.lanes[SMALL].discard(first)
    assert [placed(), placed()] == ["heavy", None]
    assert scheduler.weight == 5.0


def test_a_row_keeps_its_slot_and_the_bucket_reaches_it() -> None:
    scheduler = Scheduler(lambda _: 8)
    rows = [row(str(number)) for number in range(3)]
    for one in rows:
        scheduler.add(one)
        scheduler.place_next(1.0, ceiling=9.0)
    lane = scheduler.lanes[SMALL]
    assert lane.bucket((1, 2, 4, 8)) == 4
    lane.discard(rows[0])
    assert lane.occupied == [1, 2]
    assert lane.bucket((1, 2, 4, 8)) == 4
    assert lane.bucket((8,)) == 8
    lane.discard(rows[2])
    assert lane.bucket((1, 2, 4, 8)) == 2


def test_idle_lanes_are_forgotten_oldest_first() -> None:
    scheduler = Scheduler(lambda _: 1, spare=1)
    keys = [LaneKey("m", side, side, guided=False) for side in (8, 16, 24)]
    rows = [row(str(key.height), key) for key in keys]
    for one in rows:
        scheduler.add(one)
    assert scheduler.forget_idle() == []
    for one in rows[:2]:
        scheduler.lanes[one.lane].discard(one)
    assert scheduler.forget_idle() == keys[:1]
    assert list(scheduler.lanes) == keys[1:]


def test_labels_tell_lanes_apart() -> None:
    assert LaneKey("m", 8, 16, guided=True).label == "16x8 guided"
    assert LaneKey("m", 8, 16, guided=False).label == "16x8"
