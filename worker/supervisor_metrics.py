"""One port for a supervisor and all its workers: it asks each of them, and labels what they answer."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from contract import metrics
from contract.exposition import counter, new_registry
from worker import health

_PATIENCE_SECONDS: Final = 2.0
_HERE: Final = build_opener(ProxyHandler({}))  # a proxy of the environment is for other machines

Ports = Callable[[], Mapping[int, int]]
"""Where the workers that live serve on loopback, by number."""


class SupervisorMetrics:
    def __init__(self, workers: int, ports: Ports) -> None:
        self._ports = ports
        self._registry = new_registry()
        self._registry.register(_Workers(ports))
        self._restarts = counter(metrics.WORKER_RESTARTS, self._registry)
        for index in range(workers):
            self._restarts.labels(str(index))

    def started_again(self, index: int) -> None:
        self._restarts.labels(str(index)).inc()

    def serve(self, host: str, port: int) -> int:
        """Answers on /metrics and /healthz in threads; returns the port, which is a free one for port 0."""
        return health.serve(self._registry, self._check, host, port)

    def _check(self) -> tuple[bool, str]:
        """Well is who has a worker that is ready and none that is stuck. One that starts or dies counts as neither."""
        answers = _ask(self._ports(), "healthz")
        ready = sum(status == 200 for status, _ in answers.values())
        stuck = sum(status == 503 for status, _ in answers.values())
        return ready > 0 and stuck == 0, f"{ready} workers ready, {stuck} stuck"


class _Workers(Collector):
    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    def collect(self) -> Iterator[Metric]:
        """Families with the samples of all workers. Whoever starts, dies or hangs is left out."""
        families: dict[str, Metric] = {}
        for index, (_, answer) in _ask(self._ports(), "metrics").items():
            for one in text_string_to_metric_families(answer):
                family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    labels = sample.labels | {metrics.WORKER_LABEL: str(index)}
                    family.add_sample(sample.name, labels, sample.value)
        yield from families.values()


def _ask(ports: Mapping[int, int], path: str) -> dict[int, tuple[int, str]]:
    """Every worker's status and text, all asked at once; 0 and nothing from one that does not answer in time."""
    if not ports:
        return {}
    with ThreadPoolExecutor(len(ports)) as pool:
        answers = pool.map(lambda port: _get(f"http://127.0.0.1:{port}/{path}"), ports.values())
        return dict(zip(ports, answers, strict=True))


def _get(url: str) -> tuple[int, str]:
    try:
        with _HERE.open(url, timeout=_PATIENCE_SECONDS) as answer:
            return answer.status, str(answer.read(), "utf-8")
    except HTTPError as error:
        with error:
            return error.code, ""
    except (OSError, HTTPException):
        return 0, ""
