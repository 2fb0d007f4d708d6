"""The Helm chart: its values by their schema, its templates against both, and rendered where helm is at hand."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from contract import metrics
from contract.settings import Settings
from tests.deploy.files import CHART, OF_THE_COMMAND, ROOT, SETTINGS, check_schema, exact, run, stages, values

TEMPLATES: Final = sorted((CHART / "templates").iterdir())
OTHERS: Final = {"AWS_REGION", "AWS_ENDPOINT_URL"}
SECOND_WORKER: Final = """
ingress: {enabled: true, className: nginx, host: pictures.example, tlsSecret: tls, annotations: {a: b}}
serviceAccountName: pictures
signingKeys: {secret: {name: signing, key: keys}}
settings: {DARKROOM_MAX_QUEUE_DEPTH: 2000}
workers:
  - {name: cpu, models: [darkroom-small], device: cpu, resources: {}, replicas: 2, autoscaling: {enabled: false}}
  - name: gpu
    models: [sdxl, sd15]
    device: cuda
    image: {tag: 0.1.0-cuda}
    resources: {limits: {memory: 48Gi}}
    tolerations: [{key: nvidia.com/gpu, operator: Exists}]
    volumes: [{claim: models, subPath: sdxl, mountPath: /models/sdxl}]
    settings: {DARKROOM_BATCHING: fast}
    autoscaling: {enabled: true, minReplicas: 0, maxReplicas: 8, steps: 2000}
"""


def text_of_templates() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in TEMPLATES)


def actions(text: str) -> list[str]:
    return [" ".join(found.split()) for found in re.findall(r"\{\{-?(.*?)-?\}\}", text, re.DOTALL)]


def paths(tree: Any, prefix: str = "") -> set[str]:
    """Of all keys in maps, dotted; lists and their entries are left out."""
    if not isinstance(tree, dict):
        return set()
    own = {f"{prefix}{key}" for key in tree}
    return own.union(*(paths(value, f"{prefix}{key}.") for key, value in tree.items()))


@pytest.fixture
def schema() -> Path:
    return CHART / "values.schema.json"


def test_values_follow_their_schema(schema: Path, tmp_path: Path) -> None:
    assert check_schema("--check-metaschema", schema).returncode == 0
    checked = check_schema("--schemafile", schema, CHART / "values.yaml")
    assert checked.returncode == 0, checked.stdout
    more = values() | yaml.safe_load(SECOND_WORKER)
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    checked = check_schema("--schemafile", schema, tmp_path / "more.yaml")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gateway.replica", 2),
        ("gateway.port", 0),
        ("images.worker.tag", "latest"),
        ("store.url", "file:/pictures"),
        ("settings.MAX_QUEUE_DEPTH", 5),
        ("workers.0.device", "tpu"),
        ("workers.0.models", []),
        ("workers.0.volumes", [{"claim": "models", "mountPath": "/etc"}]),
        ("workers.0.autoscaling", {"enabled": True, "minReplicas": 0, "maxReplicas": 3}),
    ],
)
def test_wrong_values_are_refused(schema: Path, tmp_path: Path, path: str, value: object) -> None:
    changed = values()
    *parents, last = path.split(".")
    place = changed
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[last] = value
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(changed))
    assert check_schema("--schemafile", schema, tmp_path / "values.yaml").returncode == 1


def test_templates_use_values_that_exist_and_all_of_them() -> None:
    """Those of one worker are reached through the loop's variable, whose keys the schema lists."""
    text = text_of_templates()
    known = paths(values())
    used = set(re.findall(r"\.Values\.([\w.]+)", text))
    used |= {f"worker.{name}" for name in re.findall(r"\$common\.(\w+)", text)}
    used |= {f"networkPolicy.{name}" for name in re.findall(r"\$policy\.(\w+)", text)}
    assert used - known == set()
    reached = {part for path in used for part in (path, *(f"{path}.{inner}" for inner in paths(at(path))))}
    reached |= {path.rsplit(".", level)[0] for path in used for level in range(1, path.count(".") + 1)}
    assert known - reached == set(), "a value that no template reads"
    of_a_worker = json.loads((CHART / "values.schema.json").read_text())["definitions"]["worker"]["properties"]
    assert set(re.findall(r"\$worker\.(\w+)", text)) == set(of_a_worker)
    assert paths(values()["workers"][0]) >= set(of_a_worker)


def at(path: str) -> Any:
    place = values()
    for part in path.split("."):
        place = place[part]
    return place


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_open_and_close_and_define_what_they_include(path: Path) -> None:
    open_blocks: list[str] = []
    for action in actions(path.read_text(encoding="utf-8")):
        word = action.split(" ", 1)[0]
        if word in {"if", "range", "with", "define"}:
            open_blocks.append(action)
        elif word == "end":
            assert open_blocks, f"{path.name}: an end without a beginning"
            open_blocks.pop()
    assert open_blocks == []
    defined = set(re.findall(r'define "([\w.]+)"', text_of_templates()))
    assert set(re.findall(r'include "([\w.]+)"', path.read_text(encoding="utf-8"))) <= defined


def test_variables_are_settings() -> None:
    named = set(re.findall(r"\b((?:DARKROOM|AWS)_[A-Z_]+[A-Z])\b", text_of_templates()))
    assert named <= SETTINGS | OTHERS | OF_THE_COMMAND
    assert named >= {"DARKROOM_REDIS_URL", "DARKROOM_STORE_URL", "DARKROOM_DRAIN_SECONDS"}


def test_defaults_agree_with_settings_and_images() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert chart["appVersion"] == chart["version"] == project[1]
    assert exact(f"darkroom:{chart['appVersion']}")
    given, defaults = values(), Settings.model_fields
    assert given["gateway"]["port"] == defaults["port"].default
    for name in ("drain", "resume", "lease"):
        assert given["worker"][f"{name}Seconds"] == defaults[f"{name}_seconds"].default
    assert given["worker"]["drainSeconds"] > given["worker"]["resumeSeconds"]
    port = str(given["worker"]["port"])
    assert f"DARKROOM_WORKER_METRICS_PORT={port}" in " ".join(line.text for line in stages()["worker"])


def test_secrets_are_only_named() -> None:
    assert "kind: Secret" not in text_of_templates()
    inside = {path.rsplit(".secret.", 1)[1] for path in paths(values()) if ".secret." in path}
    assert inside == {"name", "key"}


def query(models: str) -> str:
    """What KEDA asks Prometheus, for models joined by |."""
    (found,) = re.findall(r"query: >-\n(.*?)\n\{\{- end", (CHART / "templates/workers.yaml").read_text(), re.DOTALL)
    text = re.sub(r"\{\{- \$models := .*?\}\}", "", found)
    return " ".join(text.replace("{{ $models }}", f'"{models}"').split())


def test_workers_are_scaled_by_metrics_that_exist() -> None:
    used = set(re.findall(r"\bdarkroom_\w+", query("a|b")))
    assert used == {metrics.STEPS_SUBMITTED.name, metrics.STEPS_ENDED.name, metrics.REDIS_UP.name}


def test_the_query_counts_each_gateway_s_figures_once(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    series = {
        'darkroom_steps_submitted_total{model="a", instance="one"}': 100,
        'darkroom_steps_submitted_total{model="a", instance="two"}': 100,
        'darkroom_steps_ended_total{model="a", instance="one"}': 30,
        'darkroom_steps_ended_total{model="a", instance="two"}': 30,
        'darkroom_steps_submitted_total{model="b", instance="one"}': 7,
        'darkroom_steps_ended_total{model="b", instance="one"}': 0,
        'darkroom_steps_submitted_total{model="other", instance="one"}': 1000,
        'darkroom_steps_ended_total{model="other", instance="one"}': 0,
        'darkroom_redis_up{instance="one"}': 1,
    }
    cases = [("a|b", [77.0]), ("other", [1000.0]), ("never", [0.0])]
    no_gateway = {"interval": "1m", "input_series": [], "promql_expr_test": [expected(query("a|b"), [])]}
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": f"{value}x3"} for name, value in series.items()],
            "promql_expr_test": [expected(query(models), samples) for models, samples in cases],
        },
        no_gateway,
    ]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": tests}))
    done = run([promtool, "test", "rules", str(tmp_path / "test.yml")])
    assert done.returncode == 0, done.stdout + done.stderr


def expected(expression: str, samples: list[float]) -> dict[str, object]:
    shown = [{"labels": "{}", "value": value} for value in samples]
    return {"expr": expression, "eval_time": "2m", "exp_samples": shown}


@pytest.fixture(params=["", SECOND_WORKER], ids=["defaults", "more"])
def rendered(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("no helm to render the chart with: see its installation page; no package of Debian has it")
    (tmp_path / "more.yaml").write_text(request.param)
    done = run([helm, "template", "prod", str(CHART), "--values", str(tmp_path / "more.yaml")])
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_what_is_rendered_fits_together(rendered: list[Any]) -> None:
    pods = [one["spec"]["template"] for one in rendered if one["kind"] == "Deployment"]
    assert pods
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert exact(container["image"])
        ports = {port["name"] for port in container["ports"]}
        assert {container[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "liveness", "readiness")} <= ports
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    labels = [pod["metadata"]["labels"] for pod in pods]
    for one in rendered:
        spec = one["spec"]
        chosen = (
            spec.get("selector", {}) if one["kind"] == "Service" else spec.get("selector", {}).get("matchLabels", {})
        )
        if chosen:
            assert any(chosen.items() <= pod.items() for pod in labels), one["metadata"]["name"]
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in rendered if one["kind"] == "ScaledObject"}
    deployments = {one["metadata"]["name"]: one for one in rendered if one["kind"] == "Deployment"}
    assert scaled <= set(deployments)
    assert [name for name in scaled if "replicas" in deployments[name]["spec"]] == []
