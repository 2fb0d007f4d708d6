"""The supervisor as its own process over a real Valkey; its children are small programs that need no torch."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker.gateway_side import JobBroker
from cli.main import app
from contract.settings import Settings
from contract.spec import JobSpec, JobStatus
from tests.tiny_models import BASE, save_tiny_models
from worker.supervisor import pause_before_restart

SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[2]
StartSupervisor = Callable[..., subprocess.Popen[str]]

# Takes every job, finishes none, does not heed SIGTERM, ends with its supervisor.
HOLDER = """
import os, signal, sys, threading, time
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from tests.tiny_models import base_card
name = sys.argv[sys.argv.index("--name") + 1]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
broker = WorkerBroker(Settings(), [base_card()], slots=8, name=name)
broker.register()
print("ready", name, os.getpid(), flush=True)
while True:
    for job in broker.take(8):
        print("took", job.job_id, name, flush=True)
    time.sleep(0.01)
"""

# Ends at the second SIGTERM.
SIGNALLED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.write(1, b"up\\n")
for _ in range(2):
    signal.sigwait([signal.SIGTERM])
    os.write(1, f"signal {sys.argv[-1]}\\n".encode())
"""


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What children read. Leases outlive the test: only the supervisor can bring a job back."""
    values: Mapping[str, Any] = {
        "redis_url": settings.redis_url,
        "store_url": settings.store_url,
        "lease_seconds": 600.0,
        "drain_seconds": 30.0,
        "worker_threads": 1,
        "log_format": "text",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"DARKROOM_{name.upper()}", str(value))


@pytest.fixture
def supervise(environment: None) -> Iterator[StartSupervisor]:
    """Runs `Supervisor(Settings(), devices, command)`; its exit status is 0 when it was told to stop."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, devices: tuple[str, ...] = ("cpu",)) -> subprocess.Popen[str]:
        program = (
            "import sys\nfrom contract.settings import Settings\nfrom contract.log import configure_log\n"
            "from worker.supervisor import Supervisor\nconfigure_log('text')\n"
            f"sys.exit(not Supervisor(Settings(), {devices!r}, {[sys.executable, *command]!r}).run())"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=SECONDS)


def heard(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Reads the output until a line matches."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(pattern, line):
            return found
    pytest.fail(f"{pattern} did not come:\n{''.join(lines)}")


def gone(pid: int) -> bool:
    """Ended, though perhaps not yet collected by whoever inherited it."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_pauses_grow_from_none_to_half_a_minute() -> None:
    assert [pause_before_restart(failures) for failures in (1, 2, 3, 4, 20)] == [0.0, 1.0, 2.0, 4.0, 30.0]


@pytest.mark.parametrize("devices", ["gpu", "cuda", "cuda:x", "cpu,cuda", ","])
def test_unknown_devices_are_refused(devices: str) -> None:
    done = CliRunner().invoke(app, ["worker", "--devices", devices])
    assert done.exit_code == 2
    assert "expected cpu or cuda:N" in done.stderr


async def test_a_killed_child_is_replaced_and_its_jobs_go_back_at_once(
    supervise: StartSupervisor, settings: Settings, make_spec: Callable[..., JobSpec]
) -> None:
    gateway = JobBroker(settings)
    spec = make_spec(model=BASE)
    await gateway.submit(spec)
    supervisor = supervise("-c", HOLDER)
    name, pid = heard(supervisor, r"^ready (\S+) (\d+)").groups()
    heard(supervisor, rf"^took {spec.id} {name}")
    os.kill(int(pid), signal.SIGKILL)
    heard(supervisor, r"jobs put back.*returned=1")
    heard(supervisor, r"worker ended.*SIGKILL")
    second = heard(supervisor, r"^ready (\S+) (\d+)")[1]
    assert second != name
    heard(supervisor, rf"^took {spec.id} {second}")
    record = await gateway.get(spec.id)
    assert record is not None
    assert record.status is JobStatus.RUNNING
    assert [worker.name for worker in await gateway.workers()] == [second]
    await gateway.close()


def test_every_signal_is_passed_on_and_the_end_of_all_children_ends_it(supervise: StartSupervisor) -> None:
    supervisor = supervise("-c", SIGNALLED, devices=("cpu", "cpu"))
    for _ in range(2):
        heard(supervisor, "^up")
    for number in (signal.SIGINT, signal.SIGTERM):
        supervisor.send_signal(number)
        names = {heard(supervisor, r"^signal (\S+)")[1] for _ in range(2)}
        assert len(names) == 2
    assert supervisor.wait(SECONDS) == 0


def test_children_divide_the_cores(supervise: StartSupervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DARKROOM_WORKER_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    supervisor = supervise(
        "-c",
        "import os, sys; names = ('DARKROOM_WORKER_THREADS', 'GOMP_SPINCOUNT')\n"
        "values = ' '.join(os.environ[name] for name in names)\n"
        "os.write(1, f'with {values}\\n'.encode()); sys.stdin.read()",
        devices=("cpu", "cpu"),
    )
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    told = [heard(supervisor, r"^with (.*)")[1] for _ in range(2)]
    assert told == [f"{share} 1000"] * 2


def test_a_child_that_cannot_stop_is_killed(supervise: StartSupervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_DRAIN_SECONDS", "0.2")
    monkeypatch.setenv("DARKROOM_LEASE_SECONDS", "0.2")
    supervisor = supervise("-c", HOLDER)
    heard(supervisor, "^ready")
    supervisor.terminate()
    heard(supervisor, "killed: did not stop in time")
    assert supervisor.wait(SECONDS) == 0


def test_a_failing_child_is_tried_again_after_growing_pauses(supervise: StartSupervisor) -> None:
    supervisor = supervise("-c", "import sys; sys.exit('out of luck')")
    told = [heard(supervisor, "worker ended.*")[0] for _ in range(2)]
    for line, pause in zip(told, ("0.0", "1.0"), strict=True):
        assert f"restart_in={pause}" in line
        assert "exit 1" in line
    supervisor.terminate()
    assert supervisor.wait(SECONDS) == 0


def test_no_start_is_repeated_that_would_fail_in_the_same_way(supervise: StartSupervisor, tmp_path: Path) -> None:
    save_tiny_models(tmp_path)
    child = ("-m", "worker.child", "--models", BASE, "--model-dir", str(tmp_path))
    supervisor = supervise(*child, devices=("cuda:99",))
    heard(supervisor, "device cuda:99 cannot be used")
    heard(supervisor, "gave up: what the worker said above will not change")
    assert supervisor.wait(SECONDS) == 1
    absent = supervise(*child[:-1], str(tmp_path / "elsewhere"))
    heard(absent, r"card\.json is missing")
    assert absent.wait(SECONDS) == 1


def test_a_metrics_port_that_is_taken_is_told(supervise: StartSupervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another supervisor on the same machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("DARKROOM_WORKER_METRICS_PORT", str(taken.getsockname()[1]))
        supervisor = supervise("-c", HOLDER)
        heard(supervisor, "no metrics: set DARKROOM_WORKER_METRICS_PORT to a free port")
        assert supervisor.wait(SECONDS) == 1


def test_a_child_drains_when_its_supervisor_is_killed(supervise: StartSupervisor, tmp_path: Path) -> None:
    save_tiny_models(tmp_path)
    supervisor = supervise("-m", "worker.child", "--models", BASE, "--model-dir", str(tmp_path))
    pid = int(heard(supervisor, r"worker started.*pid=(\d+)")[1])
    heard(supervisor, "worker ready")
    supervisor.kill()
    heard(supervisor, "worker stopped")
    wait_until(lambda: gone(pid))
