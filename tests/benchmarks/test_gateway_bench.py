"""The gateway's benchmark at a small size: real processes, every request accepted."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import gateway
from broker.embedded import free_port


def test_each_way_answers_and_is_measured() -> None:
    figures = gateway.measure(rounds=1, requests=60, connections=6)
    assert set(figures["ways"]) == set(gateway.WAYS)
    for runs in figures["ways"].values():
        assert len(runs["per second"]) == 1
        assert runs["per second"][0] > 0
        assert 0 < runs["p50 ms"][0] <= runs["p99 ms"][0]


def test_a_request_that_is_not_accepted_is_an_error(tmp_path: Path) -> None:
    port = free_port()
    command = ["http.server", "--bind", "127.0.0.1", str(port)]
    with (
        gateway.serving(command, port, tmp_path / "log") as process,
        pytest.raises(RuntimeError, match="4 of 4 requests were not accepted"),
    ):
        gateway._round(f"http://127.0.0.1:{port}", "/v1/txt2img", process.pid, requests=4, connections=4)


def test_a_server_that_does_not_start_tells_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="No module named no_such_module"),
        gateway.serving(["no_such_module"], free_port(), tmp_path / "log"),
    ):
        pass


def test_the_table_compares_medians() -> None:
    def runs(*per_second: float) -> dict[str, list[float]]:
        return {"per second": list(per_second), "cpu us": [400.0], "p50 ms": [2.0], "p99 ms": [5.0]}

    first, *others = gateway.WAYS
    figures: dict[str, Any] = {"ways": {first: runs(900, 600, 90_000), **{way: runs(1800) for way in others}}}
    lines = gateway.as_table(figures).splitlines()
    assert lines[2] == "| gateway | 900 | 1 | 400 | 2 | 5 |"
    assert all(line.endswith("| 1800 | 0.5 | 400 | 2 | 5 |") for line in lines[3:])
