"""What dashboards, rules and alerts ask Prometheus."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
INSTALL = "needs Prometheus: apt-get install --no-install-recommends prometheus"


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; the test is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(INSTALL)
    return found


@dataclass(frozen=True)
class PanelQuery:
    page: str
    panel: str
    expr: str

    def within(self, seconds: int) -> str:
        """With Grafana's variables filled in: all models, and this time as the interval of rates."""
        return self.expr.replace("$__rate_interval", f"{seconds}s").replace("$model", ".*")


def panel_queries() -> list[PanelQuery]:
    pages = [json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))]
    return [
        PanelQuery(page["title"], panel["title"], target["expr"])
        for page in pages
        for panel in page["panels"]
        for target in panel.get("targets", [])
    ]


def rules(name: str) -> list[dict[str, Any]]:
    """Of deploy/prometheus/NAME.yml."""
    document = yaml.safe_load((DEPLOY / "prometheus" / f"{name}.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def series_in(expr: str) -> Iterator[str]:
    """The names of the series that a query reads."""
    without_strings = re.sub(r'"[^"]*"', '""', expr)
    yield from re.findall(r"\b(?:up|ALERTS|[a-z_]+:[a-z_:0-9]+|[a-z_]*darkroom_[a-z_:0-9]+)\b", without_strings)
