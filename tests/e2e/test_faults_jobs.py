"""Jobs that do harm: each ends once, with a message that says what happened, and its neighbours do not notice."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.crew import Crew, CrewMember
from broker.gateway_side import JobBroker
from contract.errors import ErrorCode
from contract.spec import JobSpec, JobStatus
from tests.e2e.ends import ended, until
from tests.tiny_models import BASE

MakeSpec = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def crew(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Steps take 20 ms, so that jobs of 100 steps are there when something happens to them."""
    script = str(Path(__file__).with_name("faulty_worker.py"))
    command = [sys.executable, script, "--models", BASE, "--model-dir", str(model_dir)]
    with pytest.MonkeyPatch.context() as patch, Crew(tmp_path_factory.mktemp("crew"), command) as running:
        patch.setenv("TICK_SECONDS", "0.02")
        yield running


@pytest.fixture(scope="module")
def supervisor(crew: Crew) -> CrewMember:
    return crew.supervise(workers=1)


@pytest.fixture
async def gateway(crew: Crew, supervisor: CrewMember) -> AsyncIterator[JobBroker]:
    broker = JobBroker(crew.settings)
    yield broker
    await broker.close()


@pytest.fixture
async def neighbours(gateway: JobBroker, make_spec: MakeSpec, request: pytest.FixtureRequest) -> list[JobSpec]:
    """Innocent jobs: two of 40 steps, half a batch of pictures."""
    specs = [make_spec(id=f"{request.node.name}-neighbour-{i}", steps=40, n=2) for i in range(2)]
    for spec in specs:
        await gateway.submit(spec)
    return specs


async def unharmed(gateway: JobBroker, specs: list[JobSpec]) -> None:
    for spec in specs:
        record = await ended(gateway, spec)
        assert record.status is JobStatus.SUCCEEDED, record.error


async def test_a_job_that_raises(gateway: JobBroker, neighbours: list[JobSpec], make_spec: MakeSpec) -> None:
    spec = make_spec(id="raises", prompt="raise")
    await gateway.submit(spec)
    record = await ended(gateway, spec)
    assert record.error is not None
    assert record.error.code is ErrorCode.INTERNAL
    assert record.error.detail == "the worker met an unexpected error (prepare)"
    await unharmed(gateway, neighbours)


async def test_a_cancelled_job(gateway: JobBroker, neighbours: list[JobSpec], make_spec: MakeSpec) -> None:
    spec = make_spec(id="cancelled", steps=1000)
    await gateway.submit(spec)
    await until(gateway, spec, "progress")
    await gateway.cancel(spec.id)
    record = await ended(gateway, spec)
    assert (record.status, record.error) == (JobStatus.CANCELLED, None)
    await unharmed(gateway, neighbours)


async def test_a_deadline_that_passes(gateway: JobBroker, neighbours: list[JobSpec], make_spec: MakeSpec) -> None:
    spec = make_spec(id="late", steps=1000, deadline_seconds=1.0)
    await gateway.submit(spec)
    record = await ended(gateway, spec)
    assert record.error is not None
    assert record.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert record.error.detail == "the job did not finish within its deadline of 1 s"
    await unharmed(gateway, neighbours)


async def test_a_job_that_kills_its_process(
    gateway: JobBroker, supervisor: CrewMember, neighbours: list[JobSpec], make_spec: MakeSpec
) -> None:
    """Its neighbours die with it twice; from then on it is alone, and fails after two deaths more."""
    before = supervisor.log.read_text().count("worker started")
    spec = make_spec(id="deadly", prompt="die", steps=4)
    await gateway.submit(spec)
    record = await ended(gateway, spec)
    assert record.error is not None
    assert record.error.code is ErrorCode.WORKER_LOST
    assert record.error.detail == (
        "2 workers in a row died while running this job alone, without progress; it is not tried again"
    )
    await unharmed(gateway, neighbours)
    supervisor.wait_for("worker started", before + 4)
    assert not supervisor.said("worker started", before + 5)
