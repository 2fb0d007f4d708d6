"""A real Prometheus over our rules, scraping what a test runs."""

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from broker.embedded import free_port
from tests.deploy.queries import DEPLOY, program

_SECONDS: Final = 60.0
_SCRAPES: Final = 20
Sample = tuple[dict[str, str], float]


class PrometheusServer:
    """Use as a context manager. `targets`: host:port by the job's name in deploy/prometheus/prometheus.yml."""

    def __init__(self, folder: Path, targets: Mapping[str, str]) -> None:
        self._folder = folder
        self._targets = targets
        self._address = f"127.0.0.1:{free_port()}"
        self._http = httpx.Client(base_url=f"http://{self._address}/", timeout=20)

    def __enter__(self) -> Self:
        jobs = [{"job_name": name, "static_configs": [{"targets": [at]}]} for name, at in self._targets.items()]
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(DEPLOY / "prometheus" / name) for name in ("rules.yml", "alerts.yml")],
            "scrape_configs": jobs,
        }
        path = self._folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        command = [program("prometheus"), f"--config.file={path}", f"--storage.tsdb.path={self._folder / 'series'}"]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={self._address}", "--log.level=warn"], stdout=log, stderr=log
            )
        try:
            self.wait_for_scrapes()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()

    def query(self, expr: str, at: float | None = None) -> list[Sample]:
        """`at` in Unix seconds; None: now."""
        when = {} if at is None else {"time": str(at)}
        result = self.get("query", query=expr, **when)["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in result]

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(f"api/v1/{path}", params=parameters)
        answer.raise_for_status()
        return answer.json()["data"]

    def wait_for_scrapes(self) -> float:
        """Until every target has been scraped after this call, and often enough that extrapolation adds little to an
        increase. Returns a time at which all of that is there."""
        asked = time.time()
        while True:
            assert time.time() < asked + _SECONDS, (self._folder / "prometheus.log").read_text()
            now = time.time()
            try:
                often = f"count_over_time(up[10m]) >= {_SCRAPES}"
                scraped = self.query(f"timestamp(up) and up == 1 and {often}", now)
            except httpx.HTTPError:  # it starts
                scraped = []
            if len(scraped) == len(self._targets) and all(at > asked for _, at in scraped):
                return now
            time.sleep(0.05)
