"""The dashboards are what the code writes, and nothing asks for a metric that nobody exports."""

import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract import metrics
from tests.deploy.queries import DEPLOY, panel_queries, rules, series_in

FOLDER = DEPLOY / "grafana" / "dashboards"
PANELS: list[Any] = [
    panel for path in sorted(FOLDER.iterdir()) for panel in json.loads(path.read_text())["panels"] if "targets" in panel
]

# Of Prometheus itself.
OWN = {"up", "ALERTS"}
KNOWN = {name for metric in metrics.ALL for name in metrics.sample_names(metric)}
RECORDED = {rule["record"] for rule in rules("rules")}
EXPRESSIONS = {
    **{f"{query.page}: {query.panel}": query.expr for query in panel_queries()},
    **{rule["record"]: rule["expr"] for rule in rules("rules")},
    **{rule["alert"]: rule["expr"] for rule in rules("alerts")},
}


def test_the_dashboards_are_what_the_command_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "deploy.dashboards", tmp_path], cwd=DEPLOY.parent, check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {"throughput.json", "health.json"}
    assert written == {path.name: path.read_text() for path in FOLDER.iterdir()}, "run `make dashboards`"


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_query_names_metrics_that_exist(name: str) -> None:
    read = set(series_in(EXPRESSIONS[name]))
    assert read
    assert read <= KNOWN | RECORDED | OWN


def test_what_is_no_metric_is_found() -> None:
    assert set(series_in('sum(rate(darkroom_jobs_lost_total{code="darkroom_x"}[5m])) / model:darkroom_y:sum')) == {
        "darkroom_jobs_lost_total",
        "model:darkroom_y:sum",
    }


def test_every_metric_is_shown_somewhere() -> None:
    read = {name for expr in EXPRESSIONS.values() for name in series_in(expr)}
    unread = {metric.name for metric in metrics.ALL if not read & set(metrics.sample_names(metric))}
    assert not unread


def test_panels_read_any_prometheus_and_one_is_provisioned() -> None:
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${source}"}
    for path in FOLDER.iterdir():
        source, model = json.loads(path.read_text())["templating"]["list"]
        assert (source["name"], source["type"], source["query"]) == ("source", "datasource", "prometheus")
        assert model["datasource"]["uid"] == "${source}"
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert [one["type"] for one in provisioned["datasources"]] == ["prometheus"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_series_of_a_panel_can_be_told_apart(panel: Any) -> None:
    """By a legend that is shown and names every label that the query leaves."""
    (target,) = panel["targets"]
    by = re.search(r"by \(([^)]*)\)", target["expr"])
    left = set(by[1].split(", ")) - {"le"} if by else set()
    if panel["type"] == "table":
        return  # its columns are the labels
    named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    assert target["legendFormat"]
    assert named == left or (not by and named <= {"job", "instance", "worker", "device", "kind"})
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"]
        assert panel["options"]["tooltip"]["mode"] == "multi"


def test_panels_fill_their_lines() -> None:
    for path in FOLDER.iterdir():
        places = [panel["gridPos"] for panel in json.loads(path.read_text())["panels"]]
        for _, line in groupby(places, lambda place: place["y"]):
            assert sum(place["w"] for place in line) == 24
