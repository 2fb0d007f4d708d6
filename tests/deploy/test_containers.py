"""The images at work, as `make containers` has built them: hardened as in the compose file, with a Valkey of the tests.

Containers share the host's network, so that they reach that Valkey and need no bridge."""

import json
import os
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, Final

import httpx
import pytest
from PIL import Image

from broker.embedded import EmbeddedValkey, free_port
from tests.deploy.files import compose, run, stages

ENGINE: Final = os.environ.get("DARKROOM_TEST_ENGINE", "")
"""The command of a container engine: docker, podman."""
SECONDS: Final = 90.0

pytestmark = pytest.mark.skipif(not ENGINE, reason="no container engine was named; run: make containers")


def engine(*arguments: str) -> str:
    done = run([ENGINE, *arguments])
    assert done.returncode == 0, f"{ENGINE} {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def image(target: str) -> str:
    return f"darkroom-{target}:check"


def inside(target: str, *command: str) -> str:
    """What a command prints in a fresh container."""
    return engine("run", "--rm", "--network", "none", "--entrypoint", command[0], image(target), *command[1:])


class Service:
    """A gateway and a worker in containers of their own, by the names of the images' targets."""

    def __init__(self, redis_url: str) -> None:
        self.port, self._worker_port = free_port(), free_port()
        self._environment = {"DARKROOM_HOST": "127.0.0.1", "DARKROOM_REDIS_URL": redis_url}
        prefix = f"darkroom-check-{self.port}"
        self.names = {target: f"{prefix}-{target}" for target in ("gateway", "worker")}
        self._volumes = {f"{prefix}-store": "/var/lib/darkroom/store", f"{prefix}-models": "/models"}

    def start(self) -> None:
        self._start("gateway", {"DARKROOM_PORT": str(self.port)})
        self._start("worker", {"DARKROOM_WORKER_METRICS_PORT": str(self._worker_port)})

    def _start(self, target: str, environment: dict[str, str]) -> None:
        hardened = compose()["x-hardened"]
        options = ["--read-only", "--init", *(f"--cap-drop={name}" for name in hardened["cap_drop"])]
        options += [f"--security-opt={option.replace(':true', '')}" for option in hardened["security_opt"]]
        options += [f"--tmpfs={folder}" for folder in hardened["tmpfs"]]
        options += [f"--env={key}={value}" for key, value in (self._environment | environment).items()]
        options += [f"--volume={name}:{folder}" for name, folder in self._volumes.items()]
        engine("run", "--detach", "--network", "host", "--name", self.names[target], *options, image(target))

    def run(self, target: str, *command: str) -> str:
        return engine("exec", self.names[target], *command)

    def wait_until_healthy(self, target: str) -> None:
        """By the image's own health check, asked from here: Podman leaves asking to systemd, where there is one."""
        check = json.loads(engine("inspect", self.names[target]))[0]["Config"]["Healthcheck"]["Test"]
        assert check[0] == "CMD"
        until = time.monotonic() + SECONDS
        while (asked := run([ENGINE, "exec", self.names[target], *check[1:]])).returncode:
            assert time.monotonic() < until, asked.stderr + self.log(target)
            time.sleep(0.5)

    def log(self, target: str) -> str:
        shown = run([ENGINE, "logs", self.names[target]])
        return shown.stdout + shown.stderr

    def stop(self, target: str) -> int:
        """Exit status after the image's stop signal; an engine that loses patience kills, which is a status of 137."""
        engine("stop", "-t", "60", self.names[target])
        return int(engine("inspect", "--format", "{{.State.ExitCode}}", self.names[target]))

    def remove(self) -> None:
        run([ENGINE, "rm", "--force", *self.names.values()])
        run([ENGINE, "volume", "rm", *self._volumes])


@pytest.fixture(scope="module")
def service(valkey_server: EmbeddedValkey) -> Iterator[Service]:
    started = Service(valkey_server.url)
    try:
        started.start()
        for target in started.names:
            started.wait_until_healthy(target)
        yield started
    finally:
        started.remove()


@pytest.mark.parametrize("target", ["gateway", "worker"])
def test_an_image_says_what_the_dockerfile_says(target: str) -> None:
    config: dict[str, Any] = json.loads(engine("image", "inspect", image(target)))[0]["Config"]
    declared = {line.word: line.text for line in stages()[target] + stages()["base"]}
    assert config["User"] == declared["USER"]
    assert config["StopSignal"] == declared["STOPSIGNAL"]
    assert config["Entrypoint"] == json.loads(declared["ENTRYPOINT"])
    assert list(config["ExposedPorts"]) == [f"{declared['EXPOSE']}/tcp"]


@pytest.mark.parametrize("target", ["gateway", "worker"])
def test_nothing_of_the_build_stays(target: str) -> None:
    """Neither pip's settings, which may hold a password, nor more of the source than the installed packages."""
    assert inside(target, "sh", "-c", "cat /etc/pip.conf 2>/dev/null || true") == ""
    left = inside(target, "sh", "-c", "ls -A /app; ls -A /tmp").split()
    assert set(left) <= {"constraints.txt", "dist", "gateway.txt", "torch.txt", "worker.txt"}


def test_only_the_worker_has_torch() -> None:
    probe = "import importlib.util as u; print(*(n for n in ('torch', 'numpy', 'transformers') if u.find_spec(n)))"
    assert inside("gateway", "python", "-c", probe) == ""
    assert inside("worker", "python", "-c", probe) == "torch numpy transformers"


@pytest.mark.parametrize("target", ["gateway", "worker"])
def test_a_container_can_write_where_it_must_and_nowhere_else(service: Service, target: str) -> None:
    folders = (
        "for at in / /app /usr/local/bin /tmp /var/lib/darkroom/store /models; do test -w $at && echo $at; done; :"
    )
    assert service.run(target, "sh", "-c", folders).split() == ["/tmp", "/var/lib/darkroom/store", "/models"]
    status = service.run(target, "cat", "/proc/1/status")
    held = dict(line.split(":\t", 1) for line in status.splitlines())
    assert held["Uid"].split() == ["10001"] * 4
    assert {held[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert held["NoNewPrivs"] == "1"


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}", timeout=SECONDS) as client:
        yield client


def test_a_picture_is_made(client: httpx.Client) -> None:
    """In the worker's container, and served by the gateway's from the volume that they share."""
    body = {"prompt": "a red circle", "steps": 4, "seed": 1}
    job = client.post("/v1/txt2img", json=body, headers={"Prefer": "wait=60"}).json()
    assert job["status"] == "succeeded", job
    picture = Image.open(BytesIO(client.get(job["images"][0]["url"]).content))
    assert picture.size == (128, 128)


def test_models_and_keys_are_managed_inside(service: Service, client: httpx.Client) -> None:
    service.run("worker", "darkroom", "models", "add", "/models/darkroom-small", "--name", "second", "--copy")
    assert "second" in service.run("worker", "darkroom", "models", "list")
    key = service.run("gateway", "darkroom", "keys", "create", "--name", "check").splitlines()[0]
    _until(lambda: client.get("/v1/models").status_code == 401)
    assert client.get("/v1/models", headers={"X-API-Key": key}).status_code == 200


def _until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_they_stop_when_asked(service: Service) -> None:
    """Last of all, since nothing runs afterwards."""
    assert [service.stop(target) for target in service.names] == [0, 0]
    assert "worker stopped" in service.log("worker")
