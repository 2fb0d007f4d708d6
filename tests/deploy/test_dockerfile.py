"""The images: linted, pinned, without root, and made of what really installs."""

import json
import os
import re
import shlex
import shutil
import sys
import venv
from pathlib import Path

import pytest

from contract.settings import Settings
from tests.deploy.files import OF_THE_COMMAND, ROOT, SETTINGS, Instruction, exact, run, stages
from worker import health
from worker.measures import WorkerMetrics

TARGETS = ("gateway", "worker")


def words(stage: str, word: str) -> list[str]:
    return [line.text for line in stages()[stage] if line.word == word]


def environment(stage: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for text in words(stage, "ENV") for pair in shlex.split(text))


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert run([str(hadolint), str(ROOT / "Dockerfile")]).stdout == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text((ROOT / "Dockerfile").read_text() + "RUN pip install requests\n")
    assert "DL3013" in run([str(hadolint), str(worse)]).stdout


def test_bases_have_exact_tags() -> None:
    bases = [lines[0].text.split()[0] for lines in stages().values()]
    outside = [base for base in bases if base not in stages()]
    assert [base for base in outside if exact(base)] == outside
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", outside[0])


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_without_root_and_say_how_they_are(target: str) -> None:
    lines = [line.word for line in stages()[target]]
    assert words(target, "USER") == ["10001:10001"]
    assert lines.index("USER") > max(index for index, word in enumerate(lines) if word == "RUN")
    assert "/healthz" in words(target, "HEALTHCHECK")[0]
    assert words("base", "STOPSIGNAL") == ["SIGTERM"]


@pytest.mark.parametrize("target", TARGETS)
def test_variables_are_settings_and_ports_agree(target: str) -> None:
    found = environment(target)
    assert set(found) <= SETTINGS | OF_THE_COMMAND
    port = found["DARKROOM_PORT" if target == "gateway" else "DARKROOM_WORKER_METRICS_PORT"]
    assert words(target, "EXPOSE") == [port]
    if target == "gateway":
        assert int(port) == Settings.model_fields["port"].default
    (asked,) = re.findall(r'os\.environ\[\\"(\w+)\\"\]', words(target, "HEALTHCHECK")[0])
    assert asked in found


@pytest.mark.parametrize("target", TARGETS)
def test_health_checks_tell_the_well_from_the_stuck(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very command of the image, asking the port that the image's variable names."""
    command = json.loads(words(target, "HEALTHCHECK")[0].split(" CMD ", 1)[1])
    assert command[0] == "python"
    variable = "DARKROOM_PORT" if target == "gateway" else "DARKROOM_WORKER_METRICS_PORT"
    port = WorkerMetrics().serve("127.0.0.1", 0)  # any server with a /healthz will do
    asked = [sys.executable, *command[1:]]
    assert run(asked, env=os.environ | {variable: str(port)}).returncode == 0
    monkeypatch.setattr(health, "STUCK_SECONDS", 0.0)
    stuck = run(asked, env=os.environ | {variable: str(port)})
    assert stuck.returncode != 0
    assert "503" in stuck.stderr


def test_pip_reads_its_settings_from_a_secret_wherever_it_asks_an_index() -> None:
    asks = [line.text for lines in stages().values() for line in lines if "pip install" in line.text]
    mounted = [text for text in asks if text.startswith("--mount=type=secret,id=pip,target=/etc/pip.conf ")]
    assert len(mounted) == 4
    assert [text for text in asks if text not in mounted and "--no-index" not in text] == []


def test_the_wheel_index_is_an_argument_without_default() -> None:
    assert words("worker", "ARG") == ["TORCH_INDEX_URL"]
    assert "torch" not in " ".join(line.text for line in stages()["gateway"])


def test_weights_of_the_shipped_models_are_in_the_worker() -> None:
    copied = [shlex.split(text)[-2:] for text in words("worker", "COPY") if "weights/" in text]
    assert [target for _, target in copied] == ["/models/darkroom-small", "/models/darkroom-small-x4"]
    assert [source for source, _ in copied if not (ROOT / source / "card.json").exists()] == []
    assert environment("worker")["DARKROOM_MODEL_DIR"] == "/models"


def context() -> list[str]:
    """What .dockerignore lets in."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_the_build_sees_what_is_named_and_no_secret() -> None:
    assert [name for name in context() if not (ROOT / name).exists()] == []
    assert not {".env", ".git", ".venv"} & {name.split("/")[0] for name in context()}


class Build:
    """Runs a stage's COPY and RUN lines in a plain folder, `app` for /app, with a virtual environment for the image's
    Python. What needs root or concerns the machine (users, folders of /, secrets mounted) stays undone."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.app = folder / "app"
        self.app.mkdir(parents=True)
        self._environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "PIP_NO_COMPILE": "1"}

    def run(self, lines: list[Instruction], earlier: "Build | None" = None) -> None:
        for line in lines:
            if line.word == "COPY" and "/models/" not in line.text:
                self._copy(shlex.split(line.text), earlier)
            elif line.word == "RUN":
                script = re.sub(r"--mount=\S+ ", "", line.text)
                done = run(["bash", "-c", script], cwd=self.app, env=self._environment)
                assert done.returncode == 0, f"{line.text}\n{done.stdout}{done.stderr}"

    def _copy(self, parts: list[str], earlier: "Build | None") -> None:
        if parts == [".", "./"]:
            for name in context():
                if not name.startswith("weights"):
                    _copied(ROOT / name, self.app / name)
            return
        assert parts[0] == "--from=build"
        assert earlier is not None
        *sources, target = parts[1:]
        for source in sources:
            path = earlier.app / Path(source).relative_to("/app")
            _copied(path, self.app / path.name if target == "./" else self.app / target)


def _copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The stage `build`, with hatchling from the environment of the tests."""
    build = Build(tmp_path_factory.mktemp("build"), Path(sys.executable))
    build.run(stages()["build"])
    return build


def test_the_gateway_installs_and_has_no_torch(built: Build, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = python.with_name("pip")  # ours, at work in there: one of its own would take seconds to install
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {python} "$@"\n')
    pip.chmod(0o755)
    Build(tmp_path, python).run(stages()["gateway"], built)
    command = str(python.with_name("darkroom"))
    shown = run([command, "gateway", "--help"], cwd=tmp_path)
    assert "Serve HTTP" in shown.stdout, shown.stderr
    refused = run([command, "worker"], cwd=tmp_path)
    assert "a worker needs torch" in refused.stderr
    imports = "import importlib.util as u, service.main; print([n for n in ('torch', 'numpy') if u.find_spec(n)])"
    assert run([str(python), "-c", imports], cwd=tmp_path).stdout == "[]\n"


def test_the_worker_needs_no_more_than_the_pinned_packages(built: Build) -> None:
    """Torch is too large to be installed by a test: pip is asked whether what the worker's stage names, with these
    pins, is what the tests themselves run with."""
    folder = built.app / "requirements"
    assert (folder / "torch.txt").read_text().startswith("torch>=")
    named = re.findall(r"--requirement (\S+)", " ".join(words("worker", "RUN")))
    assert named == ["torch.txt", "worker.txt"]
    for name in named:
        asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--constraint", "constraints.txt"]
        done = run([*asked, "--requirement", f"requirements/{name}"], cwd=built.app)
        assert done.returncode == 0, done.stderr
        assert "Would install" not in done.stdout
    (wheel,) = (built.app / "dist").glob("*.whl")
    assert run([sys.executable, "-m", "zipfile", "--list", str(wheel)]).stdout.count("worker/supervisor.py") == 1
