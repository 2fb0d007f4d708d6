"""All policies make every picture of the same arrivals."""

from pathlib import Path

from benchmarks import batching
from tests.tiny_models import tiny_base
from worker.engine.resident import ResidentModel


def test_every_policy_makes_every_picture(tmp_path: Path) -> None:
    loads = batching.measure(ResidentModel(tiny_base(tmp_path)), count=5, side=32)
    assert [set(policies) for policies in loads.values()] == [set(batching.POLICIES)] * 2
    assert min(found["p50"] for policies in loads.values() for found in policies.values()) > 0
    assert batching.as_table(loads).count("step batching") == 2


def test_arrivals_are_the_same_for_all() -> None:
    first, second = (batching.arrivals(9, 2.0, 64) for _ in range(2))
    assert [(one.at, one.request.steps) for one in first] == [(one.at, one.request.steps) for one in second]
    assert {20 <= one.request.steps <= 50 for one in first} == {True}
    assert {one.at for one in batching.arrivals(3, float("inf"), 64)} == {0.0}
