"""A worker whose main loop has stopped turning says so; an idle one is well."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from broker.embedded import free_port
from contract.settings import Settings
from models.latent_diffusion import LatentDiffusion
from tests.worker.running import RunningWorker, StartWorker
from worker import health
from worker.measures import WorkerMetrics

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_metrics_are_served_over_ipv6_too() -> None:
    try:
        port = WorkerMetrics().serve("::1", 0)
    except OSError:
        pytest.skip("needs IPv6 on loopback")
    assert get(f"http://[::1]:{port}/healthz")[0] == 200


def test_who_connects_and_asks_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health._Quiet, "timeout", 0.1)
    port = WorkerMetrics().serve("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        assert silent.recv(1) == b""


def until_it_beats(metrics: WorkerMetrics) -> None:
    longest, deadline = metrics.pulse.silent_seconds, time.monotonic() + 30
    while (silent := metrics.pulse.silent_seconds) >= longest:
        assert time.monotonic() < deadline
        longest = silent
        time.sleep(0.01)


def test_a_worker_that_waits_for_redis_is_not_stuck(settings: Settings, models: Mapping[str, LatentDiffusion]) -> None:
    away = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    worker = RunningWorker(away, models)
    for _ in range(2):
        until_it_beats(worker.metrics)
    worker.stop()


def test_a_loop_that_never_turns_again_ends_its_process() -> None:
    program = """
import threading, time
from contract.log import configure_log
from worker import health
configure_log("text")
health.HOPELESS_SECONDS = 0.3
threading.Thread(target=health.end_when_hopeless, args=(health.Pulse(),), daemon=True).start()
time.sleep(600)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stuck: the process ends" in done.stdout + done.stderr


def test_the_loop_beats_while_idle_and_falls_silent_with_the_worker(start_worker: StartWorker) -> None:
    worker = start_worker()
    until_it_beats(worker.metrics)
    worker.stop()
    silent = worker.metrics.pulse.silent_seconds
    time.sleep(0.6)  # two turns of an idle loop
    assert worker.metrics.pulse.silent_seconds >= silent + 0.6
