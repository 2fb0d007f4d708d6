"""The compose file says what compose understands, and nothing that the rest of the project does not know."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.settings import Settings
from tests.deploy.files import ROOT, SETTINGS, check_schema, compose, defaults, exact, run, stages

SERVICES: dict[str, Any] = compose()["services"]
OURS = ("gateway", "worker", "worker-gpu")


def test_it_is_a_compose_file(tmp_path: Path) -> None:
    checked = check_schema("--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml")
    assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("stop_grace_period", "stop_grace"))
    assert check_schema("--builtin-schema", "vendor.compose-spec", wrong).returncode == 1


def test_images_have_exact_tags() -> None:
    images = {service["image"] for service in SERVICES.values() if "image" in service}
    assert len(images) == 4
    assert [image for image in images if not exact(image)] == []
    assert not exact("valkey/valkey:9")
    assert not exact("grafana/grafana:latest")


def test_what_is_built_is_a_stage_of_the_dockerfile() -> None:
    arguments = set(re.findall(r"^ARG (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for name in OURS:
        build = SERVICES[name]["build"]
        assert build["target"] in stages()
        assert set(build["args"]) <= arguments
        assert build["secrets"] == ["pip"]
    assert compose()["secrets"]["pip"] == {"file": "${PIP_CONF:-/dev/null}"}


def test_logs_are_bounded() -> None:
    assert {name for name, service in SERVICES.items() if "max-size" not in service["logging"]["options"]} == set()


def test_ports_are_published_on_loopback_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 4
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []
    assert "network_mode" not in str(SERVICES)


def test_every_variable_is_a_setting_with_a_value_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        environment = {key: defaults(str(value)) for key, value in SERVICES[name]["environment"].items()}
        ours = {key for key in environment if key.startswith("DARKROOM_")}
        assert ours <= SETTINGS
        with monkeypatch.context() as patch:
            for key in ours:
                patch.setenv(key, environment[key])
            settings = Settings()
        assert settings.store_url.startswith("s3://darkroom/")
        assert environment["AWS_ENDPOINT_URL"] == "http://seaweedfs:8333"


def test_ports_and_buckets_agree() -> None:
    gateway = SERVICES["gateway"]
    assert gateway["ports"] == [f"127.0.0.1:8000:{gateway['environment']['DARKROOM_PORT']}"]
    assert "-bucket=darkroom" in SERVICES["seaweedfs"]["command"]
    assert "/buckets/darkroom/" in SERVICES["seaweedfs"]["healthcheck"]["test"][1]
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    scraped = {
        (name, found["port"])
        for job in prometheus["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    worker_port = SERVICES["worker"]["environment"]["DARKROOM_WORKER_METRICS_PORT"]
    assert scraped == {("gateway", 8000), ("worker", worker_port), ("worker-gpu", worker_port)}
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    assert [source["url"] for source in sources["datasources"]] == ["http://prometheus:9090"]


def test_mounted_paths_exist_and_grafana_finds_its_dashboards() -> None:
    mounts = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            mounts[name, target] = source
            assert (ROOT / source).exists() if source.startswith(".") else source in compose()["volumes"]
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/darkroom.yml").read_text())
    paths = {one["options"]["path"] for one in provider["providers"]}
    assert paths == {"/etc/grafana/dashboards"}
    assert mounts["grafana", "/etc/grafana/dashboards"] == "./deploy/grafana/dashboards"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).name).exists()


def test_our_containers_can_do_little() -> None:
    for name in OURS:
        service = SERVICES[name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "/tmp" in service["tmpfs"]
        assert "privileged" not in service


def test_a_stopping_worker_has_time_to_drain() -> None:
    settings = Settings.model_fields
    drain, lease, resume = (settings[f"{name}_seconds"].default for name in ("drain", "lease", "resume"))
    assert drain > resume
    for name in ("worker", "worker-gpu"):
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain + lease


def test_valkey_keeps_what_it_is_told() -> None:
    command = " ".join(SERVICES["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync everysec" in command
    assert "--maxmemory-policy noeviction" in command
    assert "valkey:/data" in SERVICES["valkey"]["volumes"]


def test_the_gpu_is_reserved_in_its_profile_alone() -> None:
    gpu = SERVICES["worker-gpu"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "cuda:0" in gpu["command"]
    assert "cpu" in SERVICES["worker"]["command"]
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["worker-gpu"]


def test_make_env_draws_the_secrets_once(tmp_path: Path) -> None:
    for name in ("Makefile", ".env.example", "constraints.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    make = ["make", "--no-print-directory", "env", f"PYTHON={sys.executable}"]
    assert run(make, cwd=tmp_path).returncode == 0
    made = dict(re.findall(r"^(\w+)=(.*)$", (tmp_path / ".env").read_text(), re.MULTILINE))
    example = dict(re.findall(r"^(\w+)=(.*)$", (tmp_path / ".env.example").read_text(), re.MULTILINE))
    drawn = {name for name in made if made[name] != example[name]}
    assert drawn == required_variables()
    assert len({made[name] for name in drawn}) == len(drawn)
    assert all(re.fullmatch(r"[0-9a-f]{48}", made[name]) for name in drawn)
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert run(make, cwd=tmp_path).returncode == 0
    assert dict(re.findall(r"^(\w+)=(.*)$", (tmp_path / ".env").read_text(), re.MULTILINE)) == made


def required_variables() -> set[str]:
    return set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))


def test_the_example_names_what_the_compose_file_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert asked == set(example)
    assert required_variables()
    assert {name for name in required_variables() if example[name]} == set(), (
        "a secret in the example would be everybody's"
    )
