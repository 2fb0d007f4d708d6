"""Step batching on the real engine, against one picture after another and against static windows.

The second part of `make bench-engine`. darkroom-small, tuned, two CPU threads, 20 to 50 guided steps, fast batching;
the same arrivals for all: once all at the start, once as a Poisson process at 0.8 of what step batching could carry.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.report import FOLDER, conditions, publish, table
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from worker.engine.engine import Engine
from worker.engine.events import RowFinished
from worker.engine.numerics import has_fast_bfloat16
from worker.engine.resident import ResidentModel
from worker.engine.tuning import default_tuning, tune

NAME: Final = "bench-batching"
MODEL: Final = "darkroom-small"
SLOTS, THREADS, WINDOW_SECONDS, LOAD, LATENT_SIDE = 8, 2, 0.5, 0.8, 16


@dataclass(eq=False)
class Arrival:
    """`at` and `ended` in seconds from the start of the run."""

    name: str
    request: PictureRequest
    at: float
    ended: float = field(default=0.0)

    @property
    def seconds(self) -> float:
        return self.ended - self.at


def arrivals(count: int, per_second: float, side: int, seed: int = 0) -> list[Arrival]:
    """All at once where `per_second` is infinite."""
    rng, at, found = random.Random(seed), 0.0, []
    for number in range(count):
        at += 0.0 if per_second == float("inf") else rng.expovariate(per_second)
        steps = rng.randint(20, 50)
        request = PictureRequest("txt2img", "a pizza", side, side, seed=number, steps=steps, guidance_scale=4.0)
        found.append(Arrival(str(number), request, at))
    return found


class Run:
    """One policy over one list of arrivals, in real time."""

    def __init__(self, engine: Engine, coming: Sequence[Arrival]) -> None:
        self.engine = engine
        self._coming = list(coming)
        self._by_name = {one.name: one for one in coming}
        self._begun = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._begun

    @property
    def next_at(self) -> float:
        return self._coming[0].at if self._coming else float("inf")

    def arrived(self) -> Iterator[Arrival]:
        """Those that have come; each is given out once."""
        while self.next_at <= self.now:
            yield self._coming.pop(0)

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, until - self.now))

    def submit(self, one: Arrival) -> None:
        self.engine.submit(one.name, MODEL, one.request)

    def tick(self) -> None:
        for event in self.engine.tick():
            if isinstance(event, RowFinished):
                self._by_name[event.row_id].ended = self.now


def step_batching(run: Run) -> None:
    waiting: list[Arrival] = []
    while run.next_at < float("inf") or waiting or not run.engine.idle:
        waiting += run.arrived()
        while waiting and run.engine.free_slots:
            run.submit(waiting.pop(0))
        if run.engine.idle:
            run.wait(run.next_at)
        run.tick()


def one_by_one(run: Run) -> None:
    while run.next_at < float("inf"):
        run.wait(run.next_at)
        for one in run.arrived():
            run.submit(one)
            while not run.engine.idle:
                run.tick()


def static_window(run: Run) -> None:
    """A batch is collected until it is full or its first picture has waited for the window, then runs to its end."""
    waiting: list[Arrival] = []
    while run.next_at < float("inf") or waiting:
        waiting += run.arrived()
        closes = waiting[0].at + WINDOW_SECONDS if waiting else float("inf")
        if len(waiting) < SLOTS and run.now < closes and run.next_at < float("inf"):
            run.wait(min(closes, run.next_at))
            continue
        batch, waiting = waiting[:SLOTS], waiting[SLOTS:]
        for one in batch:
            run.submit(one)
        while not run.engine.idle:
            run.tick()


POLICIES: Final[dict[str, Callable[[Run], None]]] = {
    "step batching": step_batching,
    "static windows": static_window,
    "one by one": one_by_one,
}


def figures_of(done: Sequence[Arrival]) -> dict[str, float]:
    """Pictures per second and seconds from arrival to picture."""
    seconds = sorted(one.seconds for one in done)
    return {
        "per second": len(done) / max(one.ended for one in done),
        "p50": seconds[len(seconds) // 2],
        "p95": seconds[min(int(0.95 * len(seconds)), len(seconds) - 1)],
    }


def measure(model: ResidentModel, count: int, side: int) -> dict[str, dict[str, dict[str, float]]]:
    """By load and policy."""

    def run(policy: Callable[[Run], None], per_second: float) -> dict[str, float]:
        engine = Engine({MODEL: model}, buckets=(1, 2, 4, 8), capacity=2 * SLOTS)
        pictures = arrivals(count, per_second, side)
        policy(Run(engine, pictures))
        return figures_of(pictures)

    run(step_batching, float("inf"))  # warms up
    saturated = {name: run(policy, float("inf")) for name, policy in POLICIES.items()}
    per_second = LOAD * saturated["step batching"]["per second"]
    return {
        "all at once": saturated,
        f"load {LOAD}": {name: run(policy, per_second) for name, policy in POLICIES.items()},
    }


def as_table(loads: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = []
    for load, policies in loads.items():
        ours = policies["step batching"]
        for name, found in policies.items():
            gains = (ours["per second"] / found["per second"], ours["p95"] / found["p95"])
            rows.append((load, name, found["per second"], found["p50"], found["p95"], *gains))
    header = ("load", "policy", "pictures per second", "p50 s", "p95 s", "ours: throughput, times", "ours: p95, times")
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=48, help="pictures per run")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    cpu = torch.device("cpu")
    tuning = default_tuning(cpu, "bfloat16" if has_fast_bfloat16(cpu) else "float32")
    model = tune(LatentDiffusion.load(FOLDER.parent / "weights" / MODEL), tuning, (LATENT_SIDE, LATENT_SIDE))
    loads = measure(ResidentModel(model), options.count, side=8 * LATENT_SIDE)
    held = conditions(
        model=MODEL, dtype=tuning.dtype, threads=THREADS, pictures=options.count, load=LOAD, batching="fast"
    )
    figures: dict[str, Any] = {"conditions": held, "loads": loads}
    publish(NAME, figures, as_table(loads), options.out)


if __name__ == "__main__":
    main()
