"""Known events in a running service, and what every panel shows of them, through a real Prometheus."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.crew import Crew
from broker.connection import connect, text
from broker.embedded import free_port
from broker.worker_side import WorkerBroker
from contract import keys, metrics
from contract.metrics import Metric
from tests.deploy.prometheus_server import PrometheusServer, Sample
from tests.deploy.queries import panel_queries, program
from tests.tiny_models import BASE, base_card, save_tiny_models

ROOT: Final = Path(__file__).resolve().parents[2]
IDLE: Final = "nobody-serves-it"
SECONDS: Final = 90.0
WAITING: Final = 3
"""Unfinished jobs that a caller may have for one model: as many as this test ever asks of workers at once."""
RANGE: Final = 600
"""Seconds over which rates are taken: longer than the test."""


class Service:
    """A gateway and two supervised workers, in processes of their own; steps take 20 ms."""

    def __init__(self, crew: Crew, url: str) -> None:
        self.crew = crew
        self.http = httpx.Client(base_url=url, timeout=SECONDS)
        self.store = Path(crew.settings.store_url.removeprefix("file:"))

    def draw(self, prompt: str = "a pizza", **fields: Any) -> dict[str, Any]:
        """The job, ended."""
        body = {"prompt": prompt, "model": BASE, **fields}
        answer = self.http.post("/v1/txt2img", json=body, headers={"Prefer": "wait=60"})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def refuse(self) -> None:
        """One request of each kind that is refused."""
        assert self.http.post("/v1/txt2img", json={"prompt": "a pizza", "steps": 0}).status_code == 422
        assert self.http.get("/v1/jobs/nobody-made-it").status_code == 404
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, "PNG")
        with self.broken("inputs"):
            fields = {"prompt": "a pizza", "model": BASE}
            answer = self.http.post("/v1/img2img", data=fields, files={"image": file.getvalue()})
        assert answer.status_code == 503
        self.overfill()

    def overfill(self) -> None:
        """One job more than a caller may have waiting for a model; the others are cancelled."""
        *taken, refused = [
            self.http.post("/v1/txt2img", json={"prompt": "a pizza", "model": IDLE}) for _ in range(WAITING + 1)
        ]
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        for one in taken:
            assert self.http.post(one.json()["urls"]["cancel"]).json()["status"] == "cancelled"

    @contextmanager
    def broken(self, folder: str) -> Iterator[None]:
        """Nothing can be written into this folder of the store."""
        path, aside = self.store / folder, self.store.parent / f"{folder} aside"
        if path.exists():
            path.rename(aside)
        path.write_text("no folder")
        yield
        path.unlink()
        if aside.exists():
            aside.rename(path)

    def kill_the_worker_of(self, job: str) -> None:
        with connect(self.crew.settings.redis_url) as redis:
            wait_until(lambda: redis.get(keys.progress(job)) is not None)
            name = text(redis.hget(keys.job(job), "worker") or "")
        (pid,) = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if name in read(path)]
        os.kill(pid, signal.SIGKILL)

    def total(self, metric: Metric) -> float:
        """Of a counter in Redis, over its labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(one.value for family in families for one in family.samples if one.name == metric.name)

    @property
    def workers(self) -> int:
        return int(self.http.get("/readyz").json().get("models", {}).get(BASE, 0))


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Service, dict[str, str]]]:
    """With the addresses to scrape, by job."""
    program("prometheus")
    save_tiny_models(tmp_path / "models")
    script = ROOT / "tests" / "e2e" / "faulty_worker.py"
    command = [sys.executable, str(script), "--models", BASE, "--model-dir", str(tmp_path / "models")]
    ports = {"darkroom-gateway": free_port(), "darkroom-worker": free_port()}
    settings = {
        "port": ports["darkroom-gateway"],
        "worker_metrics_port": ports["darkroom-worker"],
        "store_patience_seconds": 0,  # a picture that cannot be stored fails its job at once
        "resume_seconds": 600,  # what a killed worker has done is lost
        "max_waiting_per_key": WAITING,
    }
    with Crew(tmp_path, command, {"TICK_SECONDS": "0.02"}, **settings) as crew:
        crew.supervise(workers=2)
        with (tmp_path / "gateway.log").open("wb") as log:
            arguments = [sys.executable, "-m", "cli.main", "gateway"]
            gateway = subprocess.Popen(arguments, env=crew.environment, cwd=ROOT, stdout=log, stderr=log)
        running = Service(crew, f"http://127.0.0.1:{ports['darkroom-gateway']}")
        try:
            wait_until(lambda: answers(running.http))
            wait_until(lambda: running.workers == 2)
            yield running, {job: f"127.0.0.1:{port}" for job, port in ports.items()}
        finally:
            running.http.close()
            gateway.kill()
            gateway.wait()


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def by(samples: list[Sample], *labels: str) -> dict[tuple[str, ...], float]:
    return {tuple(labelled[label] for label in labels): value for labelled, value in samples}


def test_every_panel_shows_what_happened(service: tuple[Service, dict[str, str]], tmp_path: Path) -> None:
    running, targets = service
    broker = WorkerBroker(running.crew.settings, [base_card().model_copy(update={"name": IDLE})], slots=1)
    broker.register()
    broker.close()
    running.refuse()  # before anybody looks: what a counter has when first seen is no increase
    with PrometheusServer(tmp_path, targets) as prometheus:
        steps = {one: running.total(one) for one in (metrics.DENOISING_STEPS, metrics.DENOISING_STEPS_REDONE)}
        jobs = happen(running)
        made = {one: running.total(one) - before for one, before in steps.items()}
        waiting = running.http.post("/v1/txt2img", json={"prompt": "a pizza", "model": IDLE}).json()
        with running.http.stream("GET", waiting["urls"]["events"]):
            now = prometheus.wait_for_scrapes()
            shown = {f"{one.page}: {one.panel}": prometheus.query(one.within(RANGE), now) for one in panel_queries()}
            rules = prometheus.get("rules")["groups"]
    unhealthy = [rule for group in rules for rule in group["rules"] if rule["health"] != "ok"]
    assert not unhealthy
    expected = throughput(jobs) | health(made)
    assert set(shown) == set(expected)
    wrong = {panel: samples for panel, samples in shown.items() if not expected[panel](samples)}
    assert not wrong, "\n".join(f"{panel}: {samples}" for panel, samples in wrong.items())


def happen(running: Service) -> list[dict[str, Any]]:
    """The events: a takeover, 7 pictures, 2 failed jobs, 5 refusals, 3 cancels. Returns the succeeded jobs."""
    with ThreadPoolExecutor(WAITING) as pool:
        long = pool.submit(running.draw, steps=100)
        wait_until(lambda: bool(running.http.get("/v1/jobs", params={"status": "running"}).json()["data"]))
        (job,) = running.http.get("/v1/jobs", params={"status": "running"}).json()["data"]
        running.kill_the_worker_of(job["id"])
        jobs = [long.result(), *pool.map(lambda seed: running.draw(seed=seed, n=2), range(3))]
    assert [job["status"] for job in jobs] == ["succeeded"] * 4
    running.refuse()
    assert running.http.post("/v1/txt2img", json={"prompt": "a pizza", "steps": -1}).status_code == 422
    assert running.draw("exhaust")["error"]["code"] == "out_of_memory"
    with running.broken("outputs"):
        assert running.draw()["error"]["code"] == "store_unavailable"
    wait_until(lambda: running.workers == 2)
    return jobs


Expected = dict[str, Callable[[list[Sample]], bool]]


def counted(expected: dict[tuple[str, ...], int], *labels: str, seconds: int = RANGE) -> Callable[[list[Sample]], bool]:
    """Of a panel of rates: the increases behind them. What is not named is 0.

    Prometheus adds up to two scrapes' worth by extrapolating, some percent here; up to 7 that cannot be taken for one
    more or one less."""

    def check(samples: list[Sample]) -> bool:
        found = {key: seconds * value for key, value in by(samples, *labels).items() if value}
        return found.keys() == expected.keys() and all(
            0.99 * count < found[key] < 1.14 * count for key, count in expected.items()
        )

    return check


def increased(expected: dict[tuple[str, ...], int], *labels: str) -> Callable[[list[Sample]], bool]:
    """Of a panel of increases."""
    return counted(expected, *labels, seconds=1)


def valued(expected: dict[tuple[str, ...], int], *labels: str) -> Callable[[list[Sample]], bool]:
    """Of a panel of plain values."""
    return lambda samples: by(samples, *labels) == expected


def within(low: float, high: float) -> Callable[[list[Sample]], bool]:
    """Every value of a panel that shows some; not a number stands for a stage that no job went through."""
    return lambda samples: bool(samples) and all(low <= value <= high for _, value in samples if value == value)


def throughput(jobs: list[dict[str, Any]]) -> Expected:
    means = {stage: sum(job["timings"][stage] for job in jobs) / len(jobs) for stage in jobs[0]["timings"]}

    def stages(samples: list[Sample]) -> bool:
        shown = {labels["stage"]: value for labels, value in samples if labels["task"] == "txt2img"}
        return shown == pytest.approx(means, rel=0.02, abs=0.001)

    return {
        "Throughput: Pictures per second": counted({(BASE, "txt2img"): 7}, "model", "task"),
        "Throughput: Jobs submitted per second": counted(
            {(BASE, "interactive"): 6, (IDLE, "interactive"): WAITING + 1}, "model", "priority"
        ),
        "Throughput: Jobs ended per second": counted(
            {("succeeded",): 4, ("failed",): 2, ("cancelled",): WAITING}, "status"
        ),
        "Throughput: Denoising steps per second": counted({(BASE,): 100 + 6 * 4}, "model"),
        "Throughput: Jobs waiting": valued(
            {
                (BASE, "interactive"): 0,
                (BASE, "batch"): 0,
                (IDLE, "interactive"): 1,
                (IDLE, "batch"): 0,
            },
            "model",
            "priority",
        ),
        "Throughput: Age of the oldest waiting job": lambda samples: (
            {(labels["model"], labels["priority"]) for labels, value in samples if value > 0} == {(IDLE, "interactive")}
        ),
        "Throughput: Denoising steps to do": valued({(BASE,): 0, (IDLE,): 4}, "model"),
        "Throughput: Jobs running": valued({(): 0}),
        "Throughput: Time waited, 95 %": within(0, SECONDS),
        "Throughput: Time per stage, mean": stages,
        "Throughput: Time per stage, 95 %": within(0, SECONDS),
        "Throughput: Pictures per tick": within(1, 8),
        "Throughput: Share of slots used": within(1 / 8, 1),
        "Throughput: Tick time, median": within(0, SECONDS),
        "Throughput: Tick time, 95 %": within(0, SECONDS),
        "Throughput: Ticks per second": within(0, 50),
    }


def health(steps: dict[Metric, float]) -> Expected:
    redone = steps[metrics.DENOISING_STEPS_REDONE] / steps[metrics.DENOISING_STEPS]
    serving = {"model": BASE, "dtype": "float32", "device": "cpu"}

    def serves(samples: list[Sample]) -> bool:
        shown = [{name: labels[name] for name in serving} for labels, _ in samples]
        return shown == [serving, serving] and len({labels["fingerprint"] for labels, _ in samples}) == 1

    return {
        "Health: Gateways": valued({(): 1}),
        "Health: Workers": valued({(BASE,): 2, (IDLE,): 0}, "model"),
        "Health: Redis": valued({(): 1}),
        "Health: Alerts firing": lambda samples: samples == [],
        "Health: Clients that follow events": valued({(): 1}),
        "Health: Answers per second": lambda samples: counted({("4",): 4, ("5",): 1}, "class")(
            [one for one in samples if one[0]["class"] != "2"]
        ),
        "Health: Errors per second": counted(
            {
                ("422", "/v1/txt2img"): 2,
                ("429", "/v1/txt2img"): 1,
                ("404", "/v1/jobs/{job_id}"): 1,
                ("503", "/v1/img2img"): 1,
            },
            "status",
            "route",
        ),
        "Health: Refused, by reason": increased(
            {("validation_failed",): 2, ("queue_full",): 1, ("job_not_found",): 1, ("store_unavailable",): 1}, "code"
        ),
        "Health: Time to the headers, 99 %": within(0, SECONDS),
        "Health: Jobs failed, by reason": increased(
            {(BASE, "out_of_memory"): 1, (BASE, "store_unavailable"): 1}, "model", "code"
        ),
        "Health: Takeovers": increased({(BASE,): 1}, "model"),
        "Health: Late results thrown away": increased({}, "model"),
        "Health: Share of steps redone": lambda samples: (
            0 < redone == pytest.approx({labels["model"]: value for labels, value in samples}[BASE], rel=0.02)
        ),
        "Health: Store errors": increased(
            {("darkroom-gateway", "put"): 1, ("darkroom-worker", "put"): 1}, "job", "operation"
        ),
        "Health: Out of memory": increased({(BASE,): 1}, "model"),
        "Health: Workers started again": lambda samples: sorted(round(value) for _, value in samples) == [0, 1],
        "Health: Memory of processes": lambda samples: len(samples) == 3 and min(value for _, value in samples) > 1e7,
        "Health: CPU of processes": lambda samples: len(samples) == 3 and min(value for _, value in samples) > 0,
        "Health: Memory of GPUs": lambda samples: samples == [],
        "Health: What workers serve": serves,
    }
