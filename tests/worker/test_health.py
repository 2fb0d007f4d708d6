"""A worker whose main loop has stopped turning says so; an idle one is well."""

import time
import urllib.error
import urllib.request

import pytest

from tests.worker.running import StartWorker
from worker import health
from worker.measures import WorkerMetrics


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_health_and_metrics_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = WorkerMetrics()
    url = f"http://127.0.0.1:{metrics.serve('127.0.0.1', 0)}"
    status, text = get(f"{url}/healthz")
    assert status == 200
    assert "last turn of the main loop 0." in text
    assert get(f"{url}/metrics")[1].startswith("# HELP darkroom_")
    monkeypatch.setattr(health, "STUCK_SECONDS", 0.0)
    assert get(f"{url}/healthz")[0] == 503
    assert get(f"{url}/metrics")[0] == 200


def test_the_loop_beats_while_idle_and_falls_silent_with_the_worker(start_worker: StartWorker) -> None:
    worker = start_worker()
    first = worker.metrics.pulse.silent_seconds
    deadline = time.monotonic() + 30
    while worker.metrics.pulse.silent_seconds >= first and time.monotonic() < deadline:
        time.sleep(0.01)
        first = max(first, worker.metrics.pulse.silent_seconds)
    assert worker.metrics.pulse.silent_seconds < first
    worker.stop()
    silent = worker.metrics.pulse.silent_seconds
    time.sleep(0.6)  # two turns of an idle loop
    assert worker.metrics.pulse.silent_seconds >= silent + 0.6
