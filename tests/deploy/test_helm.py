"""The Helm chart: its values by their schema, and rendered by Helm's own library, held against Kubernetes' schemas."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from contract import metrics
from contract.settings import Settings
from service.app import create_app
from tests.deploy.files import CHART, OF_THE_COMMAND, ROOT, SETTINGS, check_schema, exact, run, stages, values

OTHERS: Final = {"AWS_REGION", "AWS_ENDPOINT_URL"}
KUBERNETES: Final = ("1.29", "1.37")
"""The oldest that Chart.yaml takes, and the newest whose schemas are at hand."""
SECOND_WORKER: Final = yaml.safe_load("""
ingress: {enabled: true, className: nginx, host: pictures.example, tlsSecret: tls, annotations: {a: b}}
serviceAccountName: pictures
signingKeys: {secret: {name: signing, key: keys}}
settings: {DARKROOM_MAX_PIXELS: 4194304, DARKROOM_LOG_PROMPTS: true}
gateway: {replicas: 1, settings: {DARKROOM_LOG_PROMPTS: false, DARKROOM_RATE_PER_SECOND: 0.5}}
worker: {loadSeconds: 900, drainSeconds: 10.5}
autoscaling: {matchers: 'namespace="pictures"'}
networkPolicy:
  gatewayFrom: [{namespaceSelector: {matchLabels: {a: b}}}]
  metricsFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
  egress: [{ports: [{port: 988, protocol: TCP}]}]
workers:
  - {name: cpu, models: [darkroom-small], device: cpu, resources: {}, replicas: 2, autoscaling: {enabled: false}}
  - name: gpu
    models: [sdxl, sd-1.5]
    device: cuda
    image: {tag: 0.1.0-cuda}
    resources: {limits: {memory: 48Gi}}
    tolerations: [{key: nvidia.com/gpu, operator: Exists}]
    volumes: [{claim: models, subPath: sdxl, mountPath: /models/sdxl}]
    settings: {DARKROOM_BATCHING: fast}
    autoscaling: {enabled: true, minReplicas: 0, maxReplicas: 8, steps: 2000}
""")


def text_of_templates() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir()))


def paths(tree: Any, prefix: str = "") -> set[str]:
    """Of all keys in maps, dotted; lists and their entries are left out."""
    if not isinstance(tree, dict):
        return set()
    own = {f"{prefix}{key}" for key in tree}
    return own.union(*(paths(value, f"{prefix}{key}.") for key, value in tree.items()))


def helm(given: Any) -> Any:
    """What the chart becomes with these values: texts by template, or the text of the error."""
    if find_spec("helm_python") is None:
        pytest.skip("Helm's library has no wheel for this machine")
    done = run([sys.executable, "-m", "tests.deploy.helm_template", str(CHART)], input=json.dumps(given), cwd=ROOT)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


class Rendered:
    def __init__(self, given: Any) -> None:
        answer = helm(given)
        assert isinstance(answer, dict), answer
        assert answer["errors"] == []
        texts = answer["rendered"]
        self.notes = str(texts.pop("darkroom/templates/NOTES.txt"))
        self.all: list[Any] = [one for text in texts.values() for one in yaml.safe_load_all(text) if one]

    def named(self, kind: str, name: str) -> Any:
        (found,) = [one["spec"] for one in self.all if (one["kind"], one["metadata"]["name"]) == (kind, f"prod-{name}")]
        return found

    def container(self, name: str) -> Any:
        (found,) = self.named("Deployment", name)["template"]["spec"]["containers"]
        return found

    def environment(self, name: str) -> dict[str, Any]:
        variables = self.container(name)["env"]
        named = {one["name"]: one.get("value", one.get("valueFrom")) for one in variables}
        assert len(named) == len(variables), "a variable twice"
        return named


@pytest.fixture(scope="module")
def defaults() -> Rendered:
    return Rendered({})


@pytest.fixture(scope="module")
def more() -> Rendered:
    return Rendered(SECOND_WORKER)


@pytest.fixture
def schema() -> Path:
    return CHART / "values.schema.json"


def test_values_follow_their_schema(schema: Path) -> None:
    assert check_schema("--check-metaschema", schema).returncode == 0
    checked = check_schema("--schemafile", schema, CHART / "values.yaml")
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
        ("autoscaling.cooldownSeconds", 7200),  # no HorizontalPodAutoscaler takes more than an hour
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


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("which", ["defaults", "more"])
def test_kubernetes_takes_what_is_rendered(
    version: str, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rendered: Rendered = request.getfixturevalue(which)
    objects = [one for one in rendered.all if one["kind"] != "ScaledObject"]  # KEDA's, which Kubernetes does not know
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(objects))
    command = str(Path(sys.executable).with_name("kubernetes-validate"))
    done = run([command, "--strict", "-k", version, str(tmp_path / "all.yaml")])
    assert done.returncode == 0, done.stdout + done.stderr
    names = [(one["kind"], one["metadata"]["name"]) for one in rendered.all]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("which", ["defaults", "more"])
def test_what_is_rendered_fits_together(which: str, request: pytest.FixtureRequest) -> None:
    rendered: list[Any] = request.getfixturevalue(which).all
    pods = [one["spec"]["template"] for one in rendered if one["kind"] == "Deployment"]
    assert pods
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert exact(container["image"])
        assert not [name for name in pod["metadata"]["labels"] if "version" in name or "chart" in name]
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


def test_settings_arrive_as_they_are_meant(more: Rendered) -> None:
    gateway, worker = more.environment("gateway"), more.environment("worker-gpu")
    assert gateway["DARKROOM_LOG_PROMPTS"] == "false", "that of one program wins over that of all"
    assert worker["DARKROOM_LOG_PROMPTS"] == "true"
    assert gateway["DARKROOM_MAX_PIXELS"] == worker["DARKROOM_MAX_PIXELS"] == "4194304"
    assert gateway["DARKROOM_RATE_PER_SECOND"] == "0.5"
    assert gateway["DARKROOM_PUBLIC_URL"] == "https://pictures.example"
    fields = {f"DARKROOM_{name.upper()}": name for name in Settings.model_fields}
    for environment in (gateway, worker):
        plain = {fields[name]: text for name, text in environment.items() if name in fields and isinstance(text, str)}
        Settings.model_validate(plain)


def test_workers_on_cpus_use_the_cores_they_ask_for(defaults: Rendered, more: Rendered) -> None:
    threads = "DARKROOM_WORKER_THREADS"
    assert defaults.environment("worker-cpu")[threads] == {"resourceFieldRef": {"resource": "requests.cpu"}}
    assert threads not in more.environment("worker-cpu"), "it asks for none"
    assert threads not in more.environment("worker-gpu")
    chosen = Rendered({"worker": {"settings": {threads: 2}}})
    assert chosen.environment("worker-cpu")[threads] == "2"


def test_a_worker_has_the_time_to_load_and_to_drain(more: Rendered) -> None:
    worker, load = more.container("worker-gpu"), SECOND_WORKER["worker"]["loadSeconds"]
    for probe in ("startupProbe", "livenessProbe"):  # a process that died loads anew in a pod that had started
        assert worker[probe]["periodSeconds"] * worker[probe]["failureThreshold"] >= load
    deployment = more.named("Deployment", "worker-gpu")
    assert deployment["progressDeadlineSeconds"] > load
    given = values()["worker"] | SECOND_WORKER["worker"]
    grace = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > given["drainSeconds"] + given["leaseSeconds"] > 2 * given["resumeSeconds"]
    refused = helm({"worker": {"drainSeconds": 2}})
    assert "worker.drainSeconds must be longer than worker.resumeSeconds" in refused


def test_a_single_gateway_keeps_no_node_from_being_emptied(more: Rendered) -> None:
    assert more.named("Deployment", "gateway")["replicas"] == 1
    for name in ("gateway", "worker-cpu", "worker-gpu"):
        budget = more.named("PodDisruptionBudget", name)
        assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_the_ingress_leads_to_what_needs_a_key(more: Rendered, tmp_path: Path) -> None:
    (rule,) = more.named("Ingress", "gateway")["rules"]
    open_paths = tuple(one["path"] for one in rule["http"]["paths"])
    app = create_app(Settings(store_url=f"file:{tmp_path}"))
    inside = {path for path in app.openapi()["paths"] if not path.startswith(open_paths)}
    assert inside == {"/metrics", "/healthz", "/readyz"}
    assert {"/docs", app.openapi_url} <= set(open_paths)


def test_prometheus_is_let_in(more: Rendered) -> None:
    for name in ("gateway", "workers"):
        (rule,) = more.named("NetworkPolicy", name)["ingress"]
        assert SECOND_WORKER["networkPolicy"]["metricsFrom"][0] in rule["from"]
    assert SECOND_WORKER["networkPolicy"]["egress"][0] in more.named("NetworkPolicy", "egress")["egress"]
    refused = helm({"networkPolicy": {"gatewayFrom": [{"podSelector": {}}]}})
    assert "lock Prometheus out" in refused


def test_the_notes_make_a_key_where_something_runs_without_one(defaults: Rendered) -> None:
    """A gateway does not start before there is a key."""
    (command,) = re.findall(r"kubectl -n pictures exec deploy/prod-(\S+) -- darkroom keys create", defaults.notes)
    assert defaults.named("Deployment", command)
    assert command.startswith("worker-")


def query(models: list[str], matchers: str = "") -> str:
    """What KEDA asks Prometheus."""
    worker = {**values()["workers"][0], "name": "asked", "models": models}
    rendered = Rendered({"workers": [worker], "autoscaling": {"matchers": matchers}})
    (trigger,) = rendered.named("ScaledObject", "worker-asked")["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "false"
    return str(trigger["metadata"]["query"])


def test_workers_are_scaled_by_metrics_that_exist() -> None:
    used = set(re.findall(r"\bdarkroom_\w+", query(["a", "b"])))
    assert used == {
        one.name for one in (metrics.STEPS_SUBMITTED, metrics.STEPS_ENDED, metrics.WORKERS, metrics.REDIS_UP)
    }


def test_the_query_counts_each_gateway_s_figures_once(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    steps = {"a": (100, 30), "b": (7, 0), "other": (1000, 0), "s.d": (5, 0), "sxd": (50, 0), "idle": (9, 9)}
    series = {
        f'{name}{{model="{model}",instance="{gateway}",namespace="pictures"}}': value
        for model, (submitted, ended) in steps.items()
        for gateway in ("one", "two")
        for name, value in zip(
            (metrics.STEPS_SUBMITTED.name, metrics.STEPS_ENDED.name, metrics.WORKERS.name),
            (submitted, ended, 0),
            strict=True,
        )
    }
    elsewhere = {'darkroom_steps_submitted_total{model="a",namespace="staging"}': 5000}
    up = {f'darkroom_redis_up{{instance="{gateway}",namespace="pictures"}}': 1 for gateway in ("one", "two")}
    mine = 'namespace="pictures"'
    cases = {
        query(["a", "b"], mine): [77.0],
        query(["other"]): [1000.0],
        query(["s.d"]): [5.0],
        query(["idle"]): [0.0],
        # Gateways refuse jobs for a model that no worker has shown yet: one has to start, or none ever would.
        query(["never"]): [1.0],
        query(["idle", "never"]): [1.0],
    }
    nothing: dict[str, list[float]] = {expression: [] for expression in cases}
    tests = [
        promtool_test(series | elsewhere | up, cases),
        promtool_test(series | dict.fromkeys(up, 0), nothing),  # Redis is away
        promtool_test({}, nothing),
    ]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": tests}))
    done = run([promtool, "test", "rules", str(tmp_path / "test.yml")])
    assert done.returncode == 0, done.stdout + done.stderr


def promtool_test(series: dict[str, int], cases: dict[str, list[float]]) -> dict[str, object]:
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{value}x3"} for name, value in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": "2m",
                "exp_samples": [{"labels": "{}", "value": value} for value in samples],
            }
            for expression, samples in cases.items()
        ],
    }
