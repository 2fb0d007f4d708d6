"""Real servers for every test: one Valkey per session, flushed per test, and a local store in a temporary folder."""

import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from broker.connection import connect
from broker.embedded import EmbeddedValkey
from broker.gateway_side import JobBroker
from contract.settings import Settings
from contract.spec import JobSpec, Task
from training.data.sprites import FontMissingError

# Where the process that starts test processes has read a line from a terminal, they find its width here, and rich takes
# that for good.
os.environ.pop("COLUMNS", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from _skipping_without_font())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from _skipping_without_font())


def _skipping_without_font() -> Generator[None, object, object]:
    """Whatever turns out to need the emoji font is skipped where it is missing; the reason says how to install it."""
    try:
        return (yield)
    except FontMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def redis_client(valkey_server: EmbeddedValkey) -> Iterator[Redis]:
    """A synchronous client on an empty database."""
    with connect(valkey_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def settings(redis_client: Redis, valkey_server: EmbeddedValkey, tmp_path: Path) -> Settings:
    """Real Valkey (flushed), a local store; short leases. Change one with `settings.model_copy(update={...})`."""
    return Settings(
        redis_url=valkey_server.url,
        store_url=f"file:{tmp_path / 'store'}",
        lease_seconds=2.0,
        heartbeat_seconds=0.2,
        reap_seconds=0.1,
    )


@pytest.fixture
def make_spec() -> Callable[..., JobSpec]:
    """Builds a small valid spec; every call another id."""
    made = 0

    def make(**changes: Any) -> JobSpec:
        nonlocal made
        made += 1
        fields: dict[str, Any] = {
            "id": f"job-{made}",
            "task": Task.TXT2IMG,
            "model": "tiny",
            "prompt": "a red circle",
            "width": 64,
            "height": 64,
            "steps": 4,
            "guidance_scale": 3.0,
            "seed": 7,
            "created_at": 1_700_000_000.0,
        }
        return JobSpec(**{**fields, **changes})

    return make


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[JobBroker]:
    broker = JobBroker(settings)
    yield broker
    await broker.close()
