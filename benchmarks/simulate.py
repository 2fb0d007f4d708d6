"""How long pictures of mixed sizes wait under several policies, in simulated time; the scheduler is the engine's own.

`make simulate`. Poisson arrivals; a picture's slowdown is its time in the system over what it would take alone. Loads
are shares of what step batching can do at most, so a load may be more than a weaker policy can carry.
"""

import argparse
import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.report import FOLDER, conditions, publish, table
from worker.engine.scheduler import Lane, LaneKey, Row, Scheduler

NAME: Final = "simulate"
SLOTS, CAPACITY = 8, 16.0
WINDOW_SECONDS: Final = 1.0
BUCKETS: Final = (1, 2, 4, 8)


@dataclass(frozen=True)
class Kind:
    """Pictures of one lane: `share` of all; a step of b rows takes `seconds` * (1 - `marginal` + `marginal` b)."""

    lane: LaneKey
    share: float
    seconds: float
    marginal: float

    def step(self, rows: int) -> float:
        return self.seconds * (1 - self.marginal + self.marginal * rows)


# Measured on a CPU: a row of 8 costs 0.36 of a lone one on 16x16 latents, 0.6 on 32x32; on 64x64 little is gained.
KINDS: Final = (
    Kind(LaneKey("small", 16, 16, guided=True), share=0.45, seconds=0.01, marginal=0.27),
    Kind(LaneKey("small", 32, 32, guided=True), share=0.25, seconds=0.03, marginal=0.54),
    Kind(LaneKey("large", 64, 64, guided=True), share=0.2, seconds=0.05, marginal=0.7),
    Kind(LaneKey("large", 64, 64, guided=False), share=0.1, seconds=0.03, marginal=0.7),
)
DECODE_STEPS: Final = 3  # a decode takes as long as so many steps of one row


@dataclass(eq=False)
class Picture:
    id: int
    kind: Kind
    steps: int
    arrival: float
    left: int = field(init=False)
    ended: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.left = self.steps

    @property
    def alone(self) -> float:
        return self.kind.step(1) * (self.steps + DECODE_STEPS)

    @property
    def slowdown(self) -> float:
        return (self.ended - self.arrival) / self.alone


def arrivals(count: int, per_second: float, seed: int) -> list[Picture]:
    """20 to 50 steps each, in the order of their arrival; all at once where `per_second` is infinite."""
    rng = random.Random(seed)
    kinds = rng.choices(KINDS, [kind.share for kind in KINDS], k=count)
    gaps = (0.0 if per_second == float("inf") else rng.expovariate(per_second) for _ in range(count))
    times = itertools.accumulate(gaps)
    return [
        Picture(number, kind, rng.randint(20, 50), now)
        for number, (kind, now) in enumerate(zip(kinds, times, strict=True))
    ]


class OldestFirst(Scheduler):
    """The lane whose oldest row has come first."""

    def next_lane(self, now: float) -> Lane | None:
        busy = [lane for lane in self.lanes.values() if next(lane.placed, None) is not None]
        return min(busy, key=lambda lane: min(row.submitted for row in lane.rows), default=None)


class MostRows(Scheduler):
    """The lane whose batch is fullest: best for throughput."""

    def next_lane(self, now: float) -> Lane | None:
        busy = [lane for lane in self.lanes.values() if next(lane.placed, None) is not None]
        return max(busy, key=lambda lane: len(list(lane.placed)), default=None)


def step_batching(pictures: Sequence[Picture], make: Callable[..., Scheduler] = Scheduler) -> None:
    """As the engine: rows join at any step, a lane at a time takes a step or decodes."""
    scheduler, coming, now = make(lambda _: SLOTS), list(reversed(pictures)), 0.0
    by_id: dict[str, Picture] = {}
    while coming or by_id:
        while coming and coming[-1].arrival <= now and not scheduler.waiting_count and len(by_id) < CAPACITY:
            picture = by_id.setdefault(str(coming[-1].id), coming.pop())
            weight = max(picture.kind.lane.height * picture.kind.lane.width / 4096, 1.0)
            scheduler.add(Row(str(picture.id), picture.kind.lane, 1.0, picture.arrival, picture.alone, weight))
        while scheduler.place_next(now, CAPACITY) is not None:
            pass
        lane = scheduler.next_lane(now)
        if lane is None:
            now = max(now, coming[-1].arrival)
        elif lane.decoding:
            row = lane.decoding[0]
            picture = by_id.pop(row.id)
            now += DECODE_STEPS * picture.kind.step(1)
            picture.ended = now
            lane.discard(row)
        else:
            rows = [row for row in lane.slots if row is not None]
            now += by_id[rows[0].id].kind.step(lane.bucket(BUCKETS))
            for row in rows:
                by_id[row.id].left -= 1
                if not by_id[row.id].left:
                    lane.discard(row)
                    lane.decoding.append(row)


def one_by_one(pictures: Sequence[Picture]) -> None:
    now = 0.0
    for picture in pictures:
        now = picture.ended = max(now, picture.arrival) + picture.alone


def static_window(pictures: Sequence[Picture]) -> None:
    """Batches of one lane, each collected for at most a second or until full, then run to its longest row's end."""
    waiting: dict[LaneKey, list[Picture]] = {}
    ready: list[tuple[float, int, list[Picture]]] = []
    for picture in pictures:
        batch = waiting.setdefault(picture.kind.lane, [])
        if batch and picture.arrival - batch[0].arrival > WINDOW_SECONDS:
            heapq.heappush(ready, (batch[0].arrival + WINDOW_SECONDS, batch[0].id, batch))
            batch = waiting[picture.kind.lane] = []
        batch.append(picture)
        if len(batch) == SLOTS:
            heapq.heappush(ready, (picture.arrival, picture.id, waiting.pop(picture.kind.lane)))
    for batch in waiting.values():
        heapq.heappush(ready, (batch[0].arrival + WINDOW_SECONDS, batch[0].id, batch))
    now = 0.0
    while ready:
        closed, _, batch = heapq.heappop(ready)
        now = max(now, closed) + max(one.steps for one in batch) * batch[0].kind.step(len(batch))
        for picture in batch:
            now += DECODE_STEPS * picture.kind.step(1)
            picture.ended = now


Policy = Callable[[Sequence[Picture]], None]
POLICIES: Final[dict[str, Policy]] = {
    "highest stretch": step_batching,
    "oldest first": lambda pictures: step_batching(pictures, OldestFirst),
    "fullest lane": lambda pictures: step_batching(pictures, MostRows),
    "static window": static_window,
    "one by one": one_by_one,
}


def most_per_second(count: int = 400) -> float:
    """Pictures per second of step batching when all are there from the start."""
    pictures = arrivals(count, float("inf"), seed=0)
    step_batching(pictures)
    return count / max(picture.ended for picture in pictures)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def measure(policy: Policy, count: int, per_second: float, seeds: Sequence[int]) -> dict[str, float]:
    """Means over the seeds of the slowdown's percentiles, and pictures per second."""
    found: dict[str, list[float]] = {"p50": [], "p95": [], "worst": [], "per second": []}
    for seed in seeds:
        pictures = arrivals(count, per_second, seed)
        policy(pictures)
        slowdowns = [picture.slowdown for picture in pictures]
        found["p50"].append(percentile(slowdowns, 0.5))
        found["p95"].append(percentile(slowdowns, 0.95))
        found["worst"].append(max(slowdowns))
        found["per second"].append(count / (max(picture.ended for picture in pictures) - pictures[0].arrival))
    return {name: statistics.mean(values) for name, values in found.items()}


def simulate(loads: Sequence[float], count: int, seeds: Sequence[int]) -> dict[str, Any]:
    most = most_per_second()
    results = {
        str(load): {name: measure(policy, count, load * most, seeds) for name, policy in POLICIES.items()}
        for load in loads
    }
    held = conditions(pictures=count, seeds=len(seeds), slots=SLOTS, window=WINDOW_SECONDS)
    return {"conditions": held, "most per second": most, "loads": results}


def as_table(figures: dict[str, Any]) -> str:
    rows = [
        (load, name, *found.values()) for load, policies in figures["loads"].items() for name, found in policies.items()
    ]
    header = ("load", "policy", "slowdown p50", "p95", "worst", "pictures per second")
    return f"{table(header, rows)}\n\nLoad 1 is {figures['most per second']:.2f} pictures per second."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="pictures per run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    figures = simulate((0.5, 0.8, 0.9), options.count, range(1, 1 + options.seeds))
    publish(NAME, figures, as_table(figures), options.out)


if __name__ == "__main__":
    main()
