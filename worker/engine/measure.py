"""The measurements behind `calibration.json`: the form of a model that is fastest, the batch that fills the device."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from models.latent_diffusion import LatentDiffusion
from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.calibration import DeviceCalibration, Measured
from worker.engine.numerics import has_fast_bfloat16, powers_of_two, scatter_at_random
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Dtype, Tuning, candidates, tune

K = TypeVar("K")

SATURATED = 0.8
"""Share of the best throughput at which a batch counts as full."""
VISIBLE_PSNR = 40.0
"""dB; pictures nearer to one another than this are taken for equal."""
WORTHWHILE = 1.1
"""How many times as fast bf16 must be to be chosen."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """`lanes`: the usual one first. `psnr(model, other)` compares pictures of two forms of a model, in dB."""

    lanes: Sequence[LaneKey]
    slots: int
    rounds: int
    psnr: Callable[[LatentDiffusion, LatentDiffusion], float]


@torch.inference_mode()
def measure(model: LatentDiffusion, plan: Plan) -> DeviceCalibration:
    """`model` lies on the device that is measured. Takes the whole device for a minute or so."""
    dtypes: list[Dtype] = ["float32", "bfloat16"] if has_fast_bfloat16(model.device) else ["float32"]
    measured, forms = {}, {}
    for dtype in dtypes:
        tuning = fastest(model, candidates(model.device, dtype), plan)
        forms[dtype] = tune(model, tuning, _size(plan))
        measured[dtype] = _measured(ResidentModel(forms[dtype]), tuning, plan)
    psnr = plan.psnr(forms["float32"], forms["bfloat16"]) if "bfloat16" in forms else None
    return DeviceCalibration(_best_dtype(measured, plan.lanes[0].label, psnr), measured, torch.get_num_threads(), psnr)


def fastest(model: LatentDiffusion, tunings: Sequence[Tuning], plan: Plan) -> Tuning:
    """By the geometric mean over a single row and a full batch."""
    residents = {tuning: ResidentModel(tune(model, tuning, _size(plan))) for tuning in tunings}
    sizes = sorted({1, powers_of_two(plan.slots)[-1]})
    steps = {
        (tuning, rows): _step(resident, plan.lanes[0], rows) for tuning, resident in residents.items() for rows in sizes
    }
    times = timed(steps, plan.rounds)
    return min(tunings, key=lambda tuning: math.prod(times[tuning, rows] for rows in sizes))


def saturating(milliseconds: Mapping[int, float]) -> int:
    """The smallest batch with about the best throughput."""
    best = max(rows / each for rows, each in milliseconds.items())
    return min(rows for rows, each in milliseconds.items() if rows / each >= SATURATED * best)


def timed(ways: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, float]:
    """Median milliseconds of each; all take turns, after one round that is not counted."""
    times: dict[K, list[float]] = {key: [] for key in ways}
    for counted in [False] + [True] * rounds:
        for key, run in ways.items():
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if counted:
                times[key].append(1000 * (time.perf_counter() - begun))
    return {key: statistics.median(values) for key, values in times.items()}


def _measured(resident: ResidentModel, tuning: Tuning, plan: Plan) -> Measured:
    buckets, milliseconds = {}, {}
    for lane in plan.lanes:
        times = timed({rows: _step(resident, lane, rows) for rows in powers_of_two(plan.slots)}, plan.rounds)
        buckets[lane.label] = saturating(times)
        milliseconds[lane.label] = {str(rows): round(each, 1) for rows, each in times.items()}
    usual = plan.lanes[0]
    z = resident.model.autoencoder.config.latent_channels
    latents = torch.randn(1, z, usual.height, usual.width, device=resident.model.device)
    decode = timed({"decode": lambda: _decode(resident.model, latents)}, plan.rounds)["decode"]
    return Measured(tuning, buckets, milliseconds, round(decode, 1))


def _decode(model: LatentDiffusion, latents: torch.Tensor) -> None:
    decoding = model.decoding(latents)
    while not decoding.done:
        decoding.step()


def _step(resident: ResidentModel, lane: LaneKey, rows: int) -> Callable[[], None]:
    bank = Bank(resident, lane, rows)
    scatter_at_random(resident, bank)
    return lambda: runner.step(resident, bank, slice(0, rows))


def _best_dtype(measured: Mapping[Dtype, Measured], lane: str, psnr: float | None) -> Dtype:
    """bf16 where it is worth it and nobody sees the difference."""
    if psnr is None or psnr < VISIBLE_PSNR:
        return "float32"
    one, other = (statistics.geometric_mean(measured[dtype].milliseconds[lane].values()) for dtype in measured)
    return "bfloat16" if one / other >= WORTHWHILE else "float32"


def _size(plan: Plan) -> tuple[int, int]:
    return plan.lanes[0].height, plan.lanes[0].width
