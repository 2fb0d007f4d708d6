"""Gateway and worker as processes of their own over an S3 store: the whole way of a picture, an outage, a refusal."""

import asyncio
import contextlib
import subprocess
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from benchmarks.crew import Crew
from broker.embedded import free_port
from tests.s3_server import BUCKET, Relay, S3Server, environment
from tests.tiny_models import BASE
from worker.supervisor import CONFIGURATION_ERROR, worker_command

SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[2]
PROMPT = {"prompt": "a cat", "seed": 7, "steps": 4, "width": 64, "height": 64}


def gateway_process(crew: Crew, port: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cli.main", "gateway"]
    variables = crew.environment | {"DARKROOM_PORT": str(port)}
    with (crew.folder / "gateway.log").open("w") as log:
        return subprocess.Popen(command, env=variables, cwd=ROOT, stdout=log, stderr=log, text=True)


@contextlib.contextmanager
def gateway_of(crew: Crew) -> Iterator[str]:
    port = free_port()
    process = gateway_process(crew, port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def crew(s3: S3Server, model_dir: Path, tmp_path: Path) -> Iterator[Crew]:
    command = worker_command([BASE], model_dir)
    with Crew(tmp_path, command, store_url=f"s3://{BUCKET}/team", store_timeout_seconds=1.0) as crew:
        yield crew


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        yield client


def picture() -> str:
    file = BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return b64encode(file.getvalue()).decode()


async def ready(http: httpx.AsyncClient, url: str, status: int, models: int) -> None:
    """Until the gateway says so, with that many models that somebody serves."""
    async with asyncio.timeout(SECONDS):
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await http.get(f"{url}/readyz")
                if answer.status_code == status and len(answer.json().get("models", ())) == models:
                    return
            await asyncio.sleep(0.05)


async def ended(http: httpx.AsyncClient, url: str) -> dict[str, Any]:
    async with asyncio.timeout(SECONDS):
        while True:
            job: dict[str, Any] = (await http.get(url)).json()
            if job["status"] not in ("queued", "running"):
                return job
            await asyncio.sleep(0.05)


async def fetched(http: httpx.AsyncClient, image: dict[str, Any]) -> bytes:
    """By an HTTP client that knows nothing but the URL."""
    answer = (await http.get(image["url"])).raise_for_status()
    assert answer.headers["content-type"] == image["content_type"]
    assert len(answer.content) == image["bytes"]
    assert sha256(answer.content).hexdigest() == image["sha256"]
    return answer.content


async def test_pictures_through_a_bucket_and_through_its_outages(
    s3: S3Server, crew: Crew, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Relay(s3.url) as public:
        monkeypatch.setenv("DARKROOM_STORE_PUBLIC_ENDPOINT", public.url)
        s3.stop()
        worker = crew.start()
        with gateway_of(crew) as url:
            await asyncio.to_thread(worker.wait_for, "store away")  # and it starts all the same
            await ready(http, url, 503, 0)
            s3.start()
            await ready(http, url, 200, 1)
            wait = {"Prefer": f"wait={SECONDS:.0f}"}
            body = {"prompt": "a cat", "image": picture(), "steps": 4, "output_format": "webp", "n": 2}
            job = (await http.post(f"{url}/v1/img2img", json=body, headers=wait)).raise_for_status().json()
            assert job["status"] == "succeeded", job
            assert public.connections == 0
            for image in job["images"]:
                assert image["url"].startswith(f"{public.url}/{BUCKET}/team/outputs/{job['id']}/")
                assert Image.open(BytesIO(await fetched(http, image))).format == "WEBP"
            assert public.connections > 0
            again = (await http.get(job["urls"]["self"])).json()
            assert [one["sha256"] for one in again["images"]] == [one["sha256"] for one in job["images"]]

            before = (await http.post(f"{url}/v1/txt2img", json=PROMPT, headers=wait)).json()
            s3.stop()
            refused = await http.post(f"{url}/v1/img2img", json=body)
            assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
            assert int(refused.headers["retry-after"]) > 0
            assert (await http.get(f"{url}/readyz")).status_code == 503
            during = (await http.post(f"{url}/v1/txt2img", json=PROMPT)).raise_for_status().json()
            await asyncio.to_thread(worker.wait_for, "store away", 2)
            assert (await http.get(during["urls"]["self"])).json()["status"] == "running"
            s3.start()
            after = await ended(http, during["urls"]["self"])
            assert after["status"] == "succeeded", after
            assert await fetched(http, after["images"][0]) == await fetched(http, before["images"][0])

            assert (await http.delete(job["urls"]["self"])).status_code == 204
            assert (await http.get(job["images"][0]["url"])).status_code == 404


def test_processes_that_the_store_refuses_say_why_and_end(s3: S3Server, crew: Crew) -> None:
    s3.make_key()  # and nobody gets it
    worker = crew.start()
    gateway = gateway_process(crew, free_port())
    assert gateway.wait(SECONDS) != 0
    assert worker.wait() == CONFIGURATION_ERROR
    for log in (worker.log, crew.folder / "gateway.log"):
        assert "InvalidAccessKeyId" in log.read_text()
        assert "expected credentials" in log.read_text()
        assert "Traceback" not in log.read_text()
