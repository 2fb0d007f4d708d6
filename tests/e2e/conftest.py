"""Real worker processes that tests may harm."""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crew import Crew
from broker.gateway_side import JobBroker
from tests.tiny_models import BASE, save_tiny_models

MakeCrew = Callable[..., AbstractAsyncContextManager[tuple[Crew, JobBroker]]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


@pytest.fixture
def make_crew(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCrew:
    """`async with make_crew(setting=value) as (crew, gateway)`: a Valkey of its own and no worker yet. Leases last 2 s,
    steps take 20 ms, and `faulty_worker` tells what else."""
    monkeypatch.setenv("TICK_SECONDS", "0.02")
    script = str(Path(__file__).with_name("faulty_worker.py"))
    command = [sys.executable, script, "--models", BASE, "--model-dir", str(model_dir)]
    times = {"lease_seconds": 2.0, "heartbeat_seconds": 0.3, "reap_seconds": 0.1}

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[tuple[Crew, JobBroker]]:
        with Crew(tmp_path, command, **(times | settings)) as crew:
            gateway = JobBroker(crew.settings)
            try:
                yield crew, gateway
            finally:
                await gateway.close()

    return make
