"""Time is simulated, so the figures are the same on every machine."""

import pytest

from benchmarks import simulate
from benchmarks.simulate import KINDS, POLICIES, Picture, arrivals, measure, most_per_second


@pytest.mark.parametrize("policy", POLICIES)
def test_every_picture_ends_and_takes_no_less_than_alone(policy: str) -> None:
    pictures = arrivals(60, per_second=2.0, seed=3)
    POLICIES[policy](pictures)
    assert min(picture.slowdown for picture in pictures) > 0.999


def test_a_lone_picture_takes_what_it_takes_alone() -> None:
    for policy in ("highest stretch", "oldest first", "one by one"):
        picture = Picture(0, KINDS[0], 20, arrival=5.0)
        POLICIES[policy]([picture])
        assert picture.slowdown == pytest.approx(1.0)


def test_batches_save_work() -> None:
    together = [Picture(number, KINDS[0], 20, arrival=0.0) for number in range(8)]
    POLICIES["highest stretch"](together)
    assert max(picture.ended for picture in together) < 0.6 * sum(picture.alone for picture in together)


def test_highest_stretch_keeps_the_tail_short() -> None:
    load = 0.8 * most_per_second(200)
    p95 = {name: measure(policy, 400, load, seeds=(1, 2))["p95"] for name, policy in POLICIES.items()}
    assert p95["highest stretch"] == min(p95.values())
    assert p95["highest stretch"] < 0.6 * p95["static window"]
    assert p95["highest stretch"] < 0.6 * p95["oldest first"]


def test_the_table_has_a_row_per_load_and_policy() -> None:
    figures = simulate.simulate((0.5,), count=20, seeds=(1,))
    assert simulate.as_table(figures).count("| 0.5 |") == len(POLICIES)
