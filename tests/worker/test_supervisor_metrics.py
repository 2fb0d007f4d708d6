"""One port shows all workers of a supervisor: the real supervisor over children that serve like workers do."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.embedded import free_port
from contract.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0

# The first to start says that it is stuck once a file named "stuck" is there.
CHILD = """
import os, sys
from pathlib import Path
from contract import metrics
from contract.exposition import counter
from contract.settings import Settings
from prometheus_client import CollectorRegistry
from worker import health
folder = Path(sys.argv[1])
registry = CollectorRegistry()
counter(metrics.OUT_OF_MEMORY, registry).labels("tiny").inc(2)
settings = Settings()
assert settings.host == "127.0.0.1"
health.serve(registry, lambda: (not (folder / "stuck").exists(), "told"), settings.host, settings.worker_metrics_port)
(folder / str(os.getpid())).touch()
sys.stdin.read()
"""


@pytest.fixture
def port(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a supervisor with two children."""
    chosen = free_port()
    for name, value in (("REDIS_URL", settings.redis_url), ("HOST", "127.0.0.1"), ("WORKER_METRICS_PORT", str(chosen))):
        monkeypatch.setenv(f"DARKROOM_{name}", value)
    program = (
        "from contract.settings import Settings\nfrom worker.supervisor import Supervisor\n"
        f"Supervisor(Settings(), ('cpu', 'cpu'), {[sys.executable, '-c', CHILD, str(tmp_path)]!r}).run()"
    )
    proxied = {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}  # for other machines
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ | proxied)
    yield chosen
    process.kill()
    process.wait(SECONDS)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except urllib.error.URLError:
        return 0, ""


def samples(port: int) -> dict[tuple[str, str], float]:
    """By name and worker."""
    families = text_string_to_metric_families(get(port, "metrics")[1])
    return {(one.name, one.labels["worker"]): one.value for family in families for one in family.samples}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_port_shows_all_workers_and_their_health(port: int, tmp_path: Path) -> None:
    memory, restarts = "darkroom_out_of_memory_total", "darkroom_worker_restarts_total"
    wait_until(lambda: get(port, "healthz") == (200, "2 workers ready, 0 stuck\n"))
    shown = samples(port)
    assert {key: value for key, value in shown.items() if key[0] in (memory, restarts)} == {
        (memory, "0"): 2.0,
        (memory, "1"): 2.0,
        (restarts, "0"): 0.0,
        (restarts, "1"): 0.0,
    }
    pid = next(int(path.name) for path in tmp_path.iterdir())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: sorted(value for (name, _), value in samples(port).items() if name == restarts) == [0.0, 1.0])
    wait_until(lambda: get(port, "healthz")[1] == "2 workers ready, 0 stuck\n")
    (tmp_path / "stuck").touch()
    assert get(port, "healthz") == (503, "0 workers ready, 2 stuck\n")
    assert get(port, "metrics")[0] == 200
