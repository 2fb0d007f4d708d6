"""What calibration concludes from its measurements; the measuring itself on a tiny model."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from models.latent_diffusion import LatentDiffusion
from tests.tiny_models import BASE
from worker.engine import measure as measures
from worker.engine.measure import Plan, measure, saturating
from worker.engine.scheduler import LaneKey


def test_the_smallest_batch_near_the_best_throughput_saturates() -> None:
    assert saturating({1: 20.0, 2: 24.0, 4: 36.0, 8: 60.0}) == 4
    assert saturating({1: 20.0, 2: 40.0, 4: 80.0}) == 1
    assert saturating({1: 20.0, 2: 20.0, 4: 20.0}) == 4


@pytest.mark.parametrize(
    ("bf16", "psnr", "expected"),
    [(10.0, 50.0, "bfloat16"), (10.0, 25.0, "float32"), (19.0, 50.0, "float32")],
)
def test_bf16_is_chosen_where_it_pays_and_is_not_seen(
    models: Mapping[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch, bf16: float, psnr: float, expected: str
) -> None:
    """Times are made up, one per dtype; both are measured and kept whatever is chosen."""
    steps = iter([20.0, 20.0, 20.0, 20.0, bf16, bf16, bf16, bf16])

    def times(ways: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
        for run in ways.values():
            run()
        return dict.fromkeys(ways, next(steps))

    monkeypatch.setattr(measures, "timed", times)
    monkeypatch.setattr(measures, "has_fast_bfloat16", lambda _: True)
    lanes = [LaneKey(BASE, 8, 8, guided) for guided in (True, False)]
    entry = measure(models[BASE], Plan(lanes, slots=3, rounds=1, psnr=lambda *_: psnr))
    assert entry.dtype == expected
    assert all(one.buckets == {"8x8 guided": 2, "8x8": 2} for one in entry.measured.values())
    assert {one.tuning.dtype for one in entry.measured.values()} == {"float32", "bfloat16"}


def test_without_fast_bf16_it_is_not_tried(
    models: Mapping[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "has_fast_bfloat16", lambda _: False)
    entry = measure(models[BASE], Plan([LaneKey(BASE, 8, 8, True)], slots=1, rounds=1, psnr=lambda *_: 0.0))
    assert (entry.dtype, list(entry.measured), entry.psnr) == ("float32", ["float32"], None)
    assert entry.measured["float32"].buckets == {"8x8 guided": 1}
    assert entry.measured["float32"].milliseconds["8x8 guided"]["1"] > 0
