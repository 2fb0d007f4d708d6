"""A small run of `make chaos`, and that a broken promise would be noticed."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos_round import Outcome
from benchmarks.chaos_worker import POINTS
from contract.spec import JobStatus

CALM = Outcome(
    seconds=1.0,
    steps=10,
    status={"a": JobStatus.SUCCEEDED, "b": JobStatus.SUCCEEDED},
    ends={"a": 1, "b": 1},
    files={"a": [b"1"], "b": [b"2", b"3"]},
    counters={"darkroom_jobs_ended_total|tiny|txt2img|succeeded": 2},
    left=(),
)


def test_thirty_jobs_under_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chaos.main(["--jobs", "30", "--kills", "3", "--freezes", "1", "--patience", "60", "--out", str(tmp_path)])
    assert capsys.readouterr().out.endswith("0 lost, 0 doubled\n")
    figures = json.loads((tmp_path / "results" / "chaos.json").read_text())["figures"]
    assert (figures["kill -9"], figures["freezes past the lease"]) == (3, 1)
    assert figures["executions put back"] > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"status": {"a": JobStatus.SUCCEEDED, "b": JobStatus.RUNNING}}, "1 lost, 0 doubled, 0 failed"),
        ({"status": {"a": JobStatus.SUCCEEDED, "b": JobStatus.FAILED}}, "0 lost, 0 doubled, 1 failed"),
        ({"ends": {"a": 1, "b": 2}}, "0 lost, 1 doubled, 0 failed"),
        ({"counters": {"darkroom_jobs_ended_total|tiny|txt2img|succeeded": 3}}, "0 lost, 1 doubled, 0 failed"),
        ({"files": {"a": [b"1"], "b": [b"2", b"4"]}}, "1 jobs made other pictures than without faults: b"),
        ({"left": ("begun",)}, "no worker came by the points where it should have died: begun"),
    ],
)
def test_broken_promises_are_told(changes: dict[str, object], told: str) -> None:
    assert chaos.broken_promises(CALM, CALM) == []
    (found,) = chaos.broken_promises(CALM, dataclasses.replace(CALM, **changes))  # type: ignore[arg-type]
    assert found.endswith(told)


def test_every_kind_of_fault_is_planned() -> None:
    faults = chaos.Plan(jobs=300, kills=24, freezes=3, seed=0).faults()
    assert {fault: faults.count(fault) for fault in ("kill", "freeze", "restart")} == {
        "kill": 12,
        "freeze": 3,
        "restart": 1,
    }
    assert {fault.removeprefix("kill ") for fault in faults if fault.startswith("kill ")} == set(POINTS)
