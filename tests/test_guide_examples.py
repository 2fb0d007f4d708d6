"""The examples of docs/api.md and README.md run as they stand, against one running service with tiny models."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from PIL import Image

from broker.embedded import free_port
from cli.client import DarkroomClient
from cli.demo import middle_mask
from cli.server import SHIPPED_MODELS
from cli.stack import Stack, StackConfig
from service.jobs_view import JobView
from tests.tiny_models import save_tiny_as_shipped

ROOT: Final = Path(__file__).resolve().parents[1]
GUIDE: Final = (ROOT / "docs/api.md").read_text(encoding="utf-8")
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
HERE: Final = "http://127.0.0.1:8000"
KEY: Final = "a-key-of-the-settings"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def part(text: str, title: str) -> str:
    """The second-level section of this title."""
    return text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    weights = tmp_path_factory.mktemp("weights")
    save_tiny_as_shipped(weights)
    with Stack(StackConfig(tmp_path_factory.mktemp("stack"), weights, SHIPPED_MODELS)) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what `make demo` leaves, and curl's own settings: an error of the server is one of curl's."""
    (tmp_path / "demo").mkdir()
    picture = tmp_path / "demo/txt2img.png"
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(picture)
    (tmp_path / "demo/mask.png").write_bytes(middle_mask(picture.read_bytes()))
    (tmp_path / ".curlrc").write_text("fail-with-body\nshow-error\nmax-time = 60\n")
    return tmp_path


class Shell:
    """Runs blocks of a page one by one. What a reader copies from an answer into the next command, `$JOB` and
    `$PICTURE`, is copied here."""

    def __init__(self, url: str, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.url = url
        self.folder = folder
        self.environment = os.environ | {"DARKROOM_URL": url, "CURL_HOME": str(folder), "PATH": path}

    def run(self, block: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace(HERE, self.url)],
            check=False, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def run_all(self, code: list[str]) -> str:
        """All that they printed."""
        printed = ""
        for block in code:
            done = self.run(block)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            for name, pattern in (("JOB", r'"id":"(\w+)","object":"job"'), ("PICTURE", r'"url":"([^"]+)"')):
                for found in re.findall(pattern, done.stdout):
                    self.environment[name] = found
            printed += done.stdout
        return printed


def test_shell_examples_of_the_guide(stack: Stack, place: Path) -> None:
    code = blocks(GUIDE.replace(part(GUIDE, "Authentication"), ""), "sh")
    assert len(code) > 10
    printed = Shell(stack.url, place).run_all(code)
    assert '"status":"failed"' not in printed
    assert (place / "head.bin").read_bytes() == b"\x89PNG\r\n\x1a\n"
    assert (place / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^event: cancelled", (place / "ended.txt").read_text(), re.MULTILINE)


def test_python_examples_of_the_guide(stack: Stack, place: Path) -> None:
    """One script, as one session."""
    (place / "guide.py").write_text("\n".join(blocks(GUIDE, "python")))
    done = subprocess.run(
        [sys.executable, "guide.py"],
        cwd=place, env=os.environ | {"DARKROOM_URL": stack.url}, check=False, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 of 4" in done.stdout


def test_examples_with_a_key(stack: Stack, place: Path) -> None:
    """Against one more gateway, which asks for it."""
    port = free_port()
    settings = {
        "DARKROOM_REDIS_URL": stack.redis_url,
        "DARKROOM_STORE_URL": f"file:{stack.config.folder / 'store'}",
        "DARKROOM_PORT": str(port),
        "DARKROOM_API_KEYS": KEY,
    }
    command = [sys.executable, "-m", "cli.main", "gateway"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.DEVNULL) as gateway:
        try:
            shell = Shell(f"http://127.0.0.1:{port}", place)
            with DarkroomClient(shell.url) as client:
                while client.ready() is None:
                    assert gateway.poll() is None
                    time.sleep(0.05)
            (code,) = blocks(part(GUIDE, "Authentication"), "sh")
            shell.environment["DARKROOM_API_KEY"] = KEY
            assert shell.run_all([code]).count('"id":"darkroom-small"') == 2
            for line in code.splitlines():
                shell.environment["DARKROOM_API_KEY"] = "another"
                assert '"code": "unauthorized"' in shell.run(line).stdout
            refused = shell.run("darkroom jobs list")
            assert refused.returncode == 1
            assert "--api-key or DARKROOM_API_KEY" in refused.stderr
        finally:
            gateway.terminate()


def test_answers_that_the_guide_shows(stack: Stack) -> None:
    (shown,) = (json.loads(block) for block in blocks(part(GUIDE, "Errors"), "json"))
    sent = re.search(r'^`?.*(\{"prompt".*?\})` gives:', part(GUIDE, "Errors"), re.MULTILINE)
    assert sent
    answer = httpx.post(f"{stack.url}/v1/txt2img", content=sent[1], headers={"Content-Type": "application/json"})
    problem: dict[str, Any] = answer.json()
    assert {**problem, "request_id": shown["request_id"]} == shown
    accepted = httpx.post(f"{stack.url}/v1/txt2img", json={"prompt": "a star"})
    policy = accepted.headers["RateLimit-Policy"]
    assert f"\nRateLimit-Policy: {policy}\n" in GUIDE


def test_examples_of_the_readme(stack: Stack, place: Path) -> None:
    """Of its section on use: calls and commands."""
    use = part(README, "Use it")
    Shell(stack.url, place).run_all(blocks(use, "sh"))
    made = {path.name for path in place.glob("*.png")}
    assert made == set(re.findall(r"-o (\w+\.png)", use))
    (place / "example.py").write_text("\n".join(blocks(use, "python")).replace(HERE, stack.url))
    subprocess.run([sys.executable, "example.py"], cwd=place, check=True, timeout=120)
    (job,) = (json.loads(block) for block in blocks(use, "json"))
    assert set(job) <= set(JobView.model_fields)
