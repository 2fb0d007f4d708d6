"""Every rule under Prometheus' own `promtool test rules`: what it records, and each alert firing and quiet."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.queries import DEPLOY, program, rules

RULES = DEPLOY / "prometheus"
RUNBOOKS = RULES.parents[1] / "docs" / "operations.md"
Series = Mapping[str, str]


@dataclass(frozen=True)
class Recorded:
    """`series` by minute, in promtool's notation, and the samples that the rule makes of them at `minutes`."""

    series: Series
    samples: Mapping[str, float]
    minutes: int = 20


@dataclass(frozen=True)
class Alerting:
    """`value` as the texts tell it; `step` from one value of a series to the next."""

    fires: Series
    quiet: Sequence[Series]
    minutes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    value: str = ""
    step: str = "1m"


RECORDED = {
    "model_task:darkroom_pictures:rate5m": Recorded(
        {
            'darkroom_pictures_total{instance="a",model="tiny",task="txt2img"}': "0+60x30",
            'darkroom_pictures_total{instance="b",model="tiny",task="txt2img"}': "0+60x30",
        },
        {'{model="tiny",task="txt2img"}': 1.0},
    ),
    "model:darkroom_queue_depth:sum": Recorded(
        {
            'darkroom_queue_depth{instance="a",model="tiny",priority="interactive"}': "3x30",
            'darkroom_queue_depth{instance="b",model="tiny",priority="interactive"}': "3x30",
            'darkroom_queue_depth{instance="a",model="tiny",priority="batch"}': "4x30",
        },
        {'{model="tiny"}': 7},
    ),
    "model_priority:darkroom_queue_oldest_job_seconds:max": Recorded(
        {
            'darkroom_queue_oldest_job_seconds{instance="a",model="tiny",priority="batch"}': "5x30",
            'darkroom_queue_oldest_job_seconds{instance="b",model="tiny",priority="batch"}': "6x30",
        },
        {'{model="tiny",priority="batch"}': 6},
    ),
    "model:darkroom_workers:max": Recorded(
        {
            'darkroom_workers{instance="a",model="tiny"}': "2x30",
            'darkroom_workers{instance="b",model="tiny"}': "2x30",
        },
        {'{model="tiny"}': 2},
    ),
    "model:darkroom_jobs_failed:rate15m": Recorded(
        {
            'darkroom_jobs_failed_total{model="tiny",code="internal",instance="a"}': "0+15x30",
            'darkroom_jobs_failed_total{model="tiny",code="internal",instance="b"}': "0+15x30",
            'darkroom_jobs_failed_total{model="tiny",code="worker_lost",instance="a"}': "0+15x30",
            'darkroom_jobs_failed_total{model="tiny",code="deadline_exceeded",instance="a"}': "0+15x30",
        },
        {'{model="tiny"}': 0.5},
    ),
    "model:darkroom_jobs_failed:ratio15m": Recorded(
        {
            'darkroom_jobs_failed_total{model="tiny",code="internal"}': "0+15x30",
            'darkroom_jobs_failed_total{model="tiny",code="validation_failed"}': "0+15x30",
            'darkroom_jobs_ended_total{model="tiny",task="txt2img",status="failed"}': "0+30x30",
            'darkroom_jobs_ended_total{model="tiny",task="txt2img",status="succeeded"}': "0+30x30",
        },
        {'{model="tiny"}': 0.25},
    ),
    "model:darkroom_denoising_steps_redone:ratio1h": Recorded(
        {
            'darkroom_denoising_steps_redone_total{model="tiny"}': "0+30x90",
            'darkroom_denoising_steps_total{model="tiny"}': "0+60x90",
        },
        {'{model="tiny"}': 0.5},
        minutes=80,
    ),
    "model:darkroom_engine_slots_used:ratio5m": Recorded(
        {
            'darkroom_engine_rows_per_tick_sum{model="tiny",lane="8x8",worker="0"}': "0+60x30",
            'darkroom_engine_rows_per_tick_sum{model="tiny",lane="8x8",worker="1"}': "0+120x30",
            'darkroom_engine_tick_slots_total{model="tiny",lane="8x8",worker="0"}': "0+120x30",
            'darkroom_engine_tick_slots_total{model="tiny",lane="8x8",worker="1"}': "0+120x30",
        },
        {'{model="tiny"}': 0.75},
    ),
    "model_lane:darkroom_engine_tick_seconds:mean10m": Recorded(
        {
            'darkroom_engine_tick_seconds_sum{model="tiny",lane="8x8"}': "0+15x30",
            'darkroom_engine_tick_seconds_count{model="tiny",lane="8x8"}': "0+60x30",
        },
        {'{lane="8x8",model="tiny"}': 0.25},
    ),
    "model_lane:darkroom_engine_slot_seconds:mean10m": Recorded(
        {
            'darkroom_engine_tick_seconds_sum{model="tiny",lane="8x8"}': "0+15x30",
            'darkroom_engine_tick_slots_total{model="tiny",lane="8x8"}': "0+120x30",
        },
        {'{lane="8x8",model="tiny"}': 0.125},
    ),
    "darkroom_http_requests:server_errors_rate5m": Recorded(
        {
            'darkroom_http_requests_total{status="500",route="/v1/txt2img"}': "0+30x30",
            'darkroom_http_requests_total{status="503",route="/readyz"}': "0+30x30",
        },
        {"{}": 0.5},
    ),
    "darkroom_http_requests:server_error_ratio5m": Recorded(
        {
            'darkroom_http_requests_total{status="500",route="/v1/txt2img"}': "0+30x30",
            'darkroom_http_requests_total{status="404",route="unmatched"}': "0+30x30",
            'darkroom_http_requests_total{status="202",route="/v1/txt2img"}': "0+60x30",
            'darkroom_http_requests_total{status="200",route="/metrics"}': "0+600x30",
        },
        {"{}": 0.25},
    ),
    "darkroom_http_problems:rejected_ratio10m": Recorded(
        {
            'darkroom_http_problems_total{code="queue_full"}': "0+15x30",
            'darkroom_http_problems_total{code="rate_limited"}': "0+15x30",
            'darkroom_http_problems_total{code="not_found"}': "0+60x30",
            'darkroom_http_requests_total{method="POST"}': "0+60x30",
            'darkroom_http_requests_total{method="GET"}': "0+60x30",
        },
        {"{}": 0.5},
    ),
}

DEPTH, WORKERS = 'darkroom_queue_depth{model="tiny",priority="batch"}', 'darkroom_workers{model="tiny"}'
OLDEST = 'darkroom_queue_oldest_job_seconds{{model="tiny",priority="{}"}}'
TICK = tuple(
    f'darkroom_engine_tick_{part}{{model="tiny",lane="8x8"}}'
    for part in ("seconds_sum", "seconds_count", "slots_total")
)
FAILED = 'darkroom_jobs_failed_total{{model="tiny",code="{}"}}'
ENDED = 'darkroom_jobs_ended_total{model="tiny",task="txt2img",status="succeeded"}'
REAPED = 'darkroom_executions_reaped_total{model="tiny"}'
RESTARTS = 'darkroom_worker_restarts_total{instance="gpu-1:9100",job="darkroom-worker",worker="0"}'
MEMORY = 'darkroom_out_of_memory_total{model="tiny",worker="0"}'
STORE = 'darkroom_store_errors_total{job="darkroom-worker",operation="put"}'
ANSWERS = 'darkroom_http_requests_total{{method="POST",status="{}"}}'
PROBLEMS = 'darkroom_http_problems_total{{code="{}"}}'
REDIS_UP = 'darkroom_redis_up{{instance="{}"}}'
TINY = {"model": "tiny"}

ALERTING = {
    "DarkroomGatewayDown": Alerting(
        {REDIS_UP.format("a"): "1x5 _x20"},
        [{REDIS_UP.format("a"): "1x5 _x20", REDIS_UP.format("b"): "0x30"}],
        15,
    ),
    "DarkroomRedisAway": Alerting(
        {REDIS_UP.format("a"): "1x30", REDIS_UP.format("b"): "1x5 0x20"},
        [{REDIS_UP.format("a"): "1x30"}, {REDIS_UP.format("a"): "1x9 0 1x20"}],
        10,
    ),
    "DarkroomNoWorker": Alerting(
        {DEPTH: "3x30", WORKERS: "0x30"},
        [{DEPTH: "3x30", WORKERS: "1x30"}, {DEPTH: "0x30", WORKERS: "0x30"}, {DEPTH: "0x7 3x20", WORKERS: "0x30"}],
        15,
        TINY,
        "3",
    ),
    "DarkroomQueueGrowing": Alerting(
        {DEPTH: "0+10x60"},
        [{DEPTH: "500-10x60"}, {DEPTH: "500x60"}, {DEPTH: "0+1x45"}, {DEPTH: "0x24 500-1x60"}],
        40,
        TINY,
        "400",
    ),
    "DarkroomWaitingLong": Alerting(
        {OLDEST.format("interactive"): "0+60x30"},
        [{OLDEST.format("interactive"): "120x30"}, {OLDEST.format("batch"): "0+60x30"}],
        12,
        {**TINY, "priority": "interactive"},
        "12m 0s",
    ),
    "DarkroomSlowPictures": Alerting(
        {TICK[0]: "0+30x288 8730+90x12", TICK[1]: "0+300x300", TICK[2]: "0+600x300"},
        [
            {TICK[0]: "0+30x300", TICK[1]: "0+300x300", TICK[2]: "0+600x300"},
            {TICK[0]: "0+90x30", TICK[1]: "0+300x30", TICK[2]: "0+600x30"},
            {TICK[0]: "0+30x288 8730+90x12", TICK[1]: "0+300x300", TICK[2]: "0+600x288 174600+1800x12"},  # fuller
            {TICK[0]: "0+30x300", TICK[1]: "0+300x300", TICK[2]: "0+600x288 173000+200x12"},  # emptier batches
        ],
        1480,
        {**TINY, "lane": "8x8"},
        "300ms",
        "5m",
    ),
    "DarkroomJobsFailing": Alerting(
        {FAILED.format("internal"): "0+6x40", ENDED: "0+24x40"},
        [
            {FAILED.format("internal"): "0+1x40", ENDED: "0+60x40"},
            {FAILED.format("validation_failed"): "0+6x40", FAILED.format("internal"): "0x40", ENDED: "0+24x40"},
            {FAILED.format("internal"): "0x18 1 2x20", ENDED: "0x18 1 2x20"},  # two jobs in a quiet night
        ],
        30,
        TINY,
        "25%",
    ),
    "DarkroomTakeovers": Alerting(
        {REAPED: "0x20 0+8x20"},
        [{REAPED: "0x20 0 8x30"}, {f'{REAPED[:-1]},instance="{one}"}}': "0x20 0 8x4 16x30" for one in "ab"}],
        36,
        TINY,
        "15",
    ),
    "DarkroomWorkerRestarts": Alerting(
        {RESTARTS: "0x20 0+1x20"},
        [{RESTARTS: "0x20 0 1x30"}],
        36,
        {"instance": "gpu-1:9100", "job": "darkroom-worker", "worker": "0"},
        "15",
    ),
    "DarkroomOutOfMemory": Alerting({MEMORY: "0x20 0+1x20"}, [{MEMORY: "0x20 0 1x30"}], 36, TINY, "15"),
    "DarkroomStoreErrors": Alerting(
        {STORE: "0x5 0+1x20"},
        [{STORE: "0x30"}, {STORE: "0x15 0+1x20"}, {STORE: "0x12 1x3 2x20"}],
        18,
        {"job": "darkroom-worker"},
        "5",
    ),
    "DarkroomGatewayErrors": Alerting(
        {ANSWERS.format(503): "0+6x30", ANSWERS.format(202): "0+54x30"},
        [
            {ANSWERS.format(404): "0+60x30"},
            {ANSWERS.format(503): "0+1x30", ANSWERS.format(202): "0+99x30"},
            {ANSWERS.format(503): "0x8 1x3 2x20"},  # two in a quiet night
            {'darkroom_http_requests_total{method="GET",route="/readyz",status="503"}': "0+12x30"},
        ],
        15,
        {},
        "10%",
    ),
    "DarkroomRejecting": Alerting(
        {PROBLEMS.format("queue_full"): "0+30x40", ANSWERS.format(429): "0+60x40"},
        [
            {PROBLEMS.format("not_found"): "0+30x40", ANSWERS.format(404): "0+60x40"},
            {PROBLEMS.format("queue_full"): "0+1x40", ANSWERS.format(202): "0+60x40"},
        ],
        25,
        {},
        "50%",
    ),
}  # fmt: skip


def check(folder: Path, *tests: tuple[Series, dict[str, Any]], step: str = "1m") -> None:
    """Tests of promtool's, each of some series, over all our rules."""
    document = {
        "rule_files": [str(RULES / "rules.yml"), str(RULES / "alerts.yml")],
        "group_eval_order": ["darkroom-figures", "darkroom-alerts"],  # else side by side: alerts may read old figures
        "evaluation_interval": step,
        "tests": [
            {"interval": step, "input_series": [{"series": name, "values": one[name]} for name in one], **expected}
            for one, expected in tests
        ],
    }
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump(document))
    promtool("test", "rules", path)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([program("promtool"), *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def rendered(template: str, case: Alerting) -> str:
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: case.labels[found[1]], template)
    return re.sub(r"\{\{ \$value[^}]*\}\}", case.value, text)


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", RULES / "prometheus.yml")


def test_every_rule_has_its_case() -> None:
    assert [rule["record"] for rule in rules("rules")] == list(RECORDED)
    assert [rule["alert"] for rule in rules("alerts")] == list(ALERTING)


@pytest.mark.parametrize("name", RECORDED)
def test_a_rule_records(name: str, tmp_path: Path) -> None:
    case = RECORDED[name]
    samples = [{"labels": f"{name}{labels}", "value": value} for labels, value in case.samples.items()]
    expected = {"expr": name, "eval_time": f"{case.minutes}m", "exp_samples": samples}
    nothing = ({"up": "1x90"}, {"promql_expr_test": [{**expected, "exp_samples": []}]})
    check(tmp_path, (case.series, {"promql_expr_test": [expected]}), nothing)


@pytest.mark.parametrize("rule", rules("alerts"), ids=lambda rule: rule["alert"])
def test_an_alert_fires_when_it_should_and_only_then(rule: dict[str, Any], tmp_path: Path) -> None:
    case = ALERTING[rule["alert"]]
    expected = {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {name: rendered(text, case) for name, text in rule["annotations"].items()},
    }
    at = {"alertname": rule["alert"], "eval_time": f"{case.minutes}m"}
    quiet = [(series, {"alert_rule_test": [{**at, "exp_alerts": []}]}) for series in case.quiet]
    check(tmp_path, (case.fires, {"alert_rule_test": [{**at, "exp_alerts": [expected]}]}), *quiet, step=case.step)


@pytest.mark.parametrize("rule", rules("alerts"), ids=lambda rule: rule["alert"])
def test_an_alert_tells_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    name = rule["alert"]
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    assert name in re.findall(r"^#+ (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
