"""The log of a real gateway process, and what never stands in it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker.embedded import free_port
from broker.worker_side import WorkerBroker
from contract.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SECRET, PROMPT, WISH = "dk_secret-of-ann-1234567890", "a pizza on a blue background", "no anchovies"
Start = Callable[..., tuple[str, "subprocess.Popen[str]"]]


@pytest.fixture
def start(settings: Settings, worker: WorkerBroker) -> Iterator[Start]:
    """Starts `darkroom gateway` with more settings: its URL, and the process whose standard output is the log."""
    started: list[subprocess.Popen[str]] = []

    def run(**more: str) -> tuple[str, subprocess.Popen[str]]:
        port = free_port()
        chosen = {"redis_url": settings.redis_url, "store_url": settings.store_url, "port": str(port)} | more
        environment = os.environ | {f"DARKROOM_{name.upper()}": value for name, value in chosen.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "gateway"], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz")
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return f"http://127.0.0.1:{port}", process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def stopped(process: "subprocess.Popen[str]") -> str:
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    return out


def test_one_json_line_per_request_that_tells_no_secret(start: Start, painter: Any) -> None:
    url, process = start(api_keys=SECRET)
    headers = {"Authorization": f"Bearer {SECRET}", "X-Request-ID": "req-1", "Prefer": "wait=15"}
    with httpx.Client(base_url=url, timeout=20) as http:
        made = http.post("/v1/txt2img", json={"prompt": PROMPT, "negative_prompt": WISH, "seed": 3}, headers=headers)
        assert made.status_code == 200
        job = made.json()
        assert http.get(job["images"][0]["url"]).status_code == 200
        assert http.get(f"/nowhere/{PROMPT}?key={SECRET}").status_code == 404
        assert http.get("/v1/jobs", headers={"X-API-Key": SECRET[:-1]}).status_code == 401
        bad = http.post("/v1/txt2img", json={"prompt": PROMPT, "steps": "hidden wish"}, headers=headers)
        assert bad.status_code == 422
    out = stopped(process)
    assert process.returncode == 0
    lines = [json.loads(line) for line in out.splitlines()]  # the server's own lines are JSON as well
    requests = [line for line in lines if line["event"] == "request" and line["route"] != "/healthz"]
    by_answer = {(line["method"], line["route"], line["status"]): line for line in requests}
    assert len(requests) == len(by_answer)
    assert set(by_answer) == {  # a streamed answer may be logged after the next one
        ("POST", "/v1/txt2img", 200),
        ("GET", "/v1/images/{key:path}", 200),
        ("GET", "unmatched", 404),
        ("GET", "/v1/jobs", 401),
        ("POST", "/v1/txt2img", 422),
    }
    first = by_answer["POST", "/v1/txt2img", 200]
    assert (first["request_id"], first["job"], first["level"]) == ("req-1", job["id"], "info")
    assert (first["task"], first["model"], first["n"]) == ("txt2img", "darkroom-small", 1)
    assert first["seconds"] > 0
    assert len(first["key"]) == 16
    assert first["timestamp"].endswith("Z")
    for secret in (SECRET, SECRET[:-1], PROMPT, WISH, "hidden wish", "signature=", job["images"][0]["url"]):
        assert secret not in out


@pytest.mark.parametrize("form", ["json", "text"])
def test_tracebacks_show_no_values(form: str) -> None:
    """Neither those of the app nor those of the server and of libraries."""
    program = (
        "import logging, sys, structlog; from contract.log import configure_log\n"
        "def paint(prompt):\n"
        "    words = prompt.split()\n"
        "    for log in (structlog.get_logger('darkroom'), logging.getLogger('uvicorn.error')):\n"
        "        try: words[99]\n"
        "        except IndexError: log.exception('defect')\n"
        "configure_log(sys.argv[1]); paint(sys.argv[2])"
    )
    command = [sys.executable, "-c", program, form, PROMPT]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.count("IndexError") == 2
    assert out.count("in paint") == 2
    assert "pizza" not in out


def test_prompts_and_text_where_asked(start: Start) -> None:
    url, process = start(log_prompts="true", log_format="text")
    httpx.post(f"{url}/v1/txt2img", json={"prompt": PROMPT, "negative_prompt": WISH})
    out = stopped(process)
    line = next(line for line in out.splitlines() if "route=/v1/txt2img" in line)
    assert PROMPT in line
    assert WISH not in out
    assert not line.startswith("{")


def test_the_request_id_goes_with_the_job(start: Start, worker: WorkerBroker) -> None:
    url, process = start()
    httpx.post(f"{url}/v1/txt2img", json={"prompt": PROMPT}, headers={"X-Request-ID": "from-outside"})
    made = httpx.post(f"{url}/v1/txt2img", json={"prompt": PROMPT}, headers={"X-Request-ID": "not sane{}"})
    first, second = worker.take(8)
    assert first.spec.request_id == "from-outside"
    assert second.spec.request_id == made.headers["x-request-id"]
    assert "request_id" not in made.json()["request"]
    stopped(process)
