"""Kills, freezes and a restart under load: no job is lost, none ends twice, and every picture has the same bytes.

`make chaos`. Two workers under a supervisor and a Valkey with an append-only file; tiny models with random weights, one
thread each. The jobs are run once without faults, and once with faults spread evenly over the ends of the jobs.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.chaos_jobs import mixed_jobs
from benchmarks.chaos_round import Outcome, Round
from benchmarks.chaos_worker import POINTS
from benchmarks.report import FOLDER, conditions, publish, table
from contract import metrics
from tests.tiny_models import save_tiny_models

NAME: Final = "chaos"


@dataclass(frozen=True)
class Plan:
    """Half of the `kills` (-9) come at named points, half at any moment; `freezes` (SIGSTOP) outlast a lease."""

    jobs: int
    kills: int
    freezes: int
    seed: int

    def faults(self) -> list[str]:
        """In random order; once, Valkey is stopped and started."""
        named = (self.kills + 1) // 2
        points = [f"kill {POINTS[index % len(POINTS)]}" for index in range(named)]
        faults = [*points, *["kill"] * (self.kills - named), *["freeze"] * self.freezes, "restart"]
        random.Random(self.seed).shuffle(faults)
        return faults


async def measure(plan: Plan, folder: Path, patience: float) -> tuple[Outcome, Outcome]:
    """The outcomes without faults and with them; each run gets `patience` seconds."""
    save_tiny_models(folder / "models")
    specs = mixed_jobs(plan.jobs, plan.seed)
    chance = random.Random(plan.seed)
    calm = await Round(folder / "calm", folder / "models", specs, patience).run([], chance)
    return calm, await Round(folder / "chaos", folder / "models", specs, patience).run(plan.faults(), chance)


def broken_promises(calm: Outcome, chaos: Outcome) -> list[str]:
    """Empty when all is well."""
    found = []
    for outcome, when in ((calm, "without faults"), (chaos, "under faults")):
        if outcome.lost or outcome.doubled or outcome.failed:
            found.append(f"{when}: {outcome.lost} lost, {outcome.doubled} doubled, {outcome.failed} failed")
    different = [job_id for job_id, files in calm.files.items() if files != chaos.files[job_id]]
    if different:
        found.append(f"{len(different)} jobs made other pictures than without faults: {', '.join(different[:5])}")
    if chaos.left:
        found.append(f"no worker came by the points where it should have died: {', '.join(chaos.left)}")
    return found


def as_figures(plan: Plan, calm: Outcome, chaos: Outcome) -> dict[str, Any]:
    pictures = sum(len(files) for files in calm.files.values())
    equal = sum(
        one == other
        for job_id, files in calm.files.items()
        for one, other in zip(files, chaos.files[job_id], strict=False)
    )
    return {
        "jobs": plan.jobs,
        "lost": chaos.lost,
        "doubled": chaos.doubled,
        "failed": chaos.failed,
        "pictures with the same bytes": f"{equal} of {pictures}",
        "kill -9": plan.kills - len(chaos.left),
        "freezes past the lease": plan.freezes,
        "restarts of Valkey": 1,
        "executions put back": chaos.count(metrics.EXECUTIONS_REAPED),
        "late results thrown away": chaos.count(metrics.RESULTS_FENCED),
        "denoising steps done twice, in percent": 100 * (chaos.steps - calm.steps) / calm.steps,
        "seconds without faults": calm.seconds,
        "seconds with them": chaos.seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--freezes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=400.0, help="seconds after which a job counts as lost")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    plan = Plan(options.jobs, options.kills, options.freezes, options.seed)
    with tempfile.TemporaryDirectory(prefix="darkroom-chaos-") as folder:
        calm, chaos = asyncio.run(measure(plan, Path(folder), options.patience))
    figures = as_figures(plan, calm, chaos)
    text = table(("chaos", ""), list(figures.items()))
    if broken := broken_promises(calm, chaos):
        sys.exit("\n".join([text, *broken]))
    publish(NAME, {"conditions": conditions(threads=1, **asdict(plan)), "figures": figures}, text, options.out)
    print("0 lost, 0 doubled")


if __name__ == "__main__":
    main()
