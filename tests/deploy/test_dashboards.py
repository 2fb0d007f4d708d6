"""The dashboards are what the code writes, and nothing asks for a metric that nobody exports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from contract import metrics
from tests.deploy.queries import DEPLOY, panel_queries, rules, series_in

FOLDER = DEPLOY / "grafana" / "dashboards"

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


def test_panels_read_the_data_source_that_is_provisioned() -> None:
    provisioned = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    used = {uid for path in FOLDER.iterdir() for uid in re.findall(r'"uid": "(.*)"', path.read_text())}
    assert {uid for uid in used if not uid.startswith("darkroom-")} == set(re.findall(r"uid: (\w+)", provisioned))
