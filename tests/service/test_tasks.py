"""The way of a request over HTTP: accepted, queued as a spec, finished, looked at, deleted."""

import io
import json
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from broker.worker_side import WorkerBroker
from contract.settings import Settings
from contract.spec import JobSpec, OutputFormat, Priority, Task
from tests.service.picture_makers import file_of

PROMPT = "a pizza on a blue background"


def png(width: int = 64, height: int = 64, colour: Any = (9, 99, 200), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, "PNG")
    return file.getvalue()


def text(data: bytes) -> str:
    return b64encode(data).decode()


def take_one(worker: WorkerBroker) -> JobSpec:
    (job,) = worker.take(8)
    return job.spec


async def test_a_prompt_becomes_a_job(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    answer = await client.post("/v1/txt2img", json={"prompt": PROMPT})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == job["urls"]["self"] == f"{client.base_url}/v1/jobs/{job['id']}"
    assert (job["object"], job["task"], job["model"], job["status"]) == ("job", "txt2img", "darkroom-small", "queued")
    assert (job["queue_position"], job["images"], job["error"]) == (0, [], None)
    assert job["progress"] == {"step": 0, "steps": 20}
    spec = take_one(worker)
    assert spec.id == job["id"]
    assert (spec.width, spec.height, spec.steps, spec.guidance_scale) == (128, 128, 20, 3.0)
    assert spec.seed == job["request"]["seed"]
    assert 0 <= spec.seed < 2**32


async def test_every_field_arrives(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    asked = {
        "prompt": "größe ☕ \u202e", "negative_prompt": "blur", "model": "darkroom-small", "width": 100, "height": 33,
        "steps": 7, "guidance_scale": 4.5, "sampler": "dpmpp_2m", "seed": 2**63 - 1, "n": 3, "eta": 0.0,
        "priority": "batch", "deadline_seconds": 60, "output_format": "webp", "output_quality": 70, "metadata": False,
    }  # fmt: skip
    job = (await client.post("/v1/txt2img", json=asked)).raise_for_status().json()
    spec = take_one(worker)
    assert {name: json.loads(spec.to_json())[name] for name in asked} == asked
    assert spec.priority is Priority.BATCH
    assert spec.output_format is OutputFormat.WEBP
    assert {name: job["request"][name] for name in asked} == asked


async def test_prefer_wait_brings_the_pictures(client: httpx.AsyncClient, painter: Any) -> None:
    answer = await client.post("/v1/txt2img", json={"prompt": PROMPT, "n": 2, "seed": 5}, headers={"Prefer": "wait=15"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=15"
    job = answer.json()
    assert job["status"] == "succeeded"
    assert [(image["index"], image["seed"]) for image in job["images"]] == [(0, 5), (1, 6)]
    assert job["timings"]["denoise"] == 0.1
    assert job["started_at"] <= job["finished_at"]
    for image in job["images"]:
        file = await client.get(image["url"])
        assert file.status_code == 200
        assert file.headers["content-type"] == "image/png"
        assert "private" in file.headers["cache-control"]
        assert sha256(file.content).hexdigest() == image["sha256"]
        assert len(file.content) == image["bytes"]


async def test_waiting_ends_when_time_is_up(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    answer = await client.post("/v1/txt2img", json={"prompt": PROMPT}, headers={"Prefer": "wait=1"})
    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"


@pytest.mark.parametrize("as_form", [False, True], ids=["json", "form"])
async def test_inpaint_stores_plain_png_inputs(
    client: httpx.AsyncClient, worker: WorkerBroker, settings: Settings, as_form: bool
) -> None:
    image, mask = png(80, 48), png(80, 48, 255, "L")
    fields = {"prompt": PROMPT, "strength": 0.5, "seed": 3, "steps": 4, "metadata": False}
    if as_form:
        fields |= {"metadata": "false"}
        answer = await client.post("/v1/inpaint", data=fields, files={"image": image, "mask": mask})
    else:
        pictures = {"image": text(image), "mask": f"data:image/png;base64,{text(mask)}"}
        answer = await client.post("/v1/inpaint", json=fields | pictures)
    assert answer.status_code == 202, answer.text
    spec = take_one(worker)
    assert (spec.task, spec.width, spec.height, spec.strength) == (Task.INPAINT, 80, 48, 0.5)
    assert (spec.steps, spec.guidance_scale, spec.metadata) == (4, 2.5, False)
    folder = Path(settings.store_url.removeprefix("file:"))
    stored = {name: Image.open(folder / key) for name, key in spec.inputs.items()}
    assert {name: (found.format, found.mode, found.size) for name, found in stored.items()} == {
        "image": ("PNG", "RGB", (80, 48)),
        "mask": ("PNG", "L", (80, 48)),
    }
    assert stored["image"].getpixel((0, 0)) == (9, 99, 200)
    assert stored["mask"].getpixel((0, 0)) == 255
    assert "image" not in answer.json()["request"]


async def test_a_mask_is_of_the_upright_picture(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    """Of a photo that a camera took on its side, whether the mask was made upright or lies on its side as well."""
    lying = Image.Exif()
    lying[0x0112] = 6
    photo, mask = file_of(Image.new("RGB", (24, 16)), "JPEG", exif=lying), Image.new("L", (24, 16), 255)
    for right in (file_of(mask.transpose(Image.Transpose.ROTATE_270)), file_of(mask, "JPEG", exif=lying)):
        answer = await client.post("/v1/inpaint", data={"prompt": PROMPT}, files={"image": photo, "mask": right})
        assert answer.status_code == 202, answer.text
        spec = take_one(worker)
        assert (spec.width, spec.height) == (16, 24)
    wrong = await client.post("/v1/inpaint", data={"prompt": PROMPT}, files={"image": photo, "mask": file_of(mask)})
    assert "the mask is 24×16; expected the image's size, 16×24" in wrong.json()["errors"][0]["detail"]


async def test_upscale_multiplies_the_size(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    answer = await client.post("/v1/upscale", files={"image": png(50, 37)})
    assert answer.status_code == 202, answer.text
    spec = take_one(worker)
    assert (spec.model, spec.width, spec.height, spec.prompt) == ("darkroom-small-x4", 200, 148, "")
    assert (spec.steps, spec.guidance_scale) == (10, 1.0)


@pytest.mark.parametrize(("asked", "used"), [(None, 20), (0, 0), (350, 350), (7.0, 7)])
async def test_the_noise_level_of_an_upscaler(
    client: httpx.AsyncClient, worker: WorkerBroker, asked: float | None, used: int
) -> None:
    picture = {"image": text(png(16, 16))}
    given = {} if asked is None else {"noise_level": asked}
    job = (await client.post("/v1/upscale", json=given | picture)).raise_for_status().json()
    spec = take_one(worker)
    assert spec.noise_level == job["request"]["noise_level"] == used
    again = await client.post("/v1/upscale", json=job["request"] | picture)
    assert again.json()["request"] == job["request"]
    listed = (await client.get("/v1/jobs")).json()["data"]
    assert [one["request"]["noise_level"] for one in listed] == [used, used]


async def test_only_where_it_means_something_a_noise_level_is_told(
    client: httpx.AsyncClient, worker: WorkerBroker
) -> None:
    picture = {"image": text(png(16, 16)), "model": "plain-x4"}
    for task, body in (("txt2img", {"prompt": PROMPT}), ("upscale", picture)):
        job = (await client.post(f"/v1/{task}", json=body)).raise_for_status().json()
        assert "noise_level" not in job["request"]
        assert take_one(worker).noise_level is None
    models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
    levels = {name: (one["default_noise_level"], one["max_noise_level"]) for name, one in models.items()}
    assert levels["darkroom-small-x4"] == (20, 350)
    assert {level for name, level in levels.items() if name != "darkroom-small-x4"} == {(None, None)}


async def test_the_request_of_a_job_makes_the_same_job_again(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    picture = {"image": text(png())}
    first = (await client.post("/v1/img2img", json={"prompt": PROMPT} | picture)).raise_for_status().json()
    again = (await client.post("/v1/img2img", json=first["request"] | picture)).raise_for_status().json()
    assert again["request"] == first["request"]
    specs = [json.loads(job.spec.to_json()) for job in worker.take(8)]
    for spec in specs:
        for name in ("id", "created_at", "inputs", "request_id"):
            del spec[name]
    assert specs[0] == specs[1]
    assert specs[0]["strength"] == 0.8


async def test_a_key_used_twice_gives_one_job(
    client: httpx.AsyncClient, worker: WorkerBroker, settings: Settings, queued: Callable[[], int]
) -> None:
    headers, fields = {"Idempotency-Key": "abc"}, {"prompt": PROMPT, "strength": 0.5}
    first = await client.post("/v1/img2img", json=fields | {"image": text(png())}, headers=headers)
    again = await client.post("/v1/img2img", data=fields, files={"image": png()}, headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["request"]["seed"] == again.json()["request"]["seed"]
    assert queued() == 1
    inputs = Path(settings.store_url.removeprefix("file:")) / "inputs"
    assert [folder.name for folder in inputs.iterdir()] == [first.json()["id"]]

    other = await client.post("/v1/img2img", json=fields | {"image": text(png(64, 32))}, headers=headers)
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_mismatch"
    assert other.json()["errors"][0]["header"] == "Idempotency-Key"
    assert queued() == 1
    assert len(list(inputs.iterdir())) == 1


async def test_jobs_are_listed_page_by_page(client: httpx.AsyncClient, painter: Any) -> None:
    made = []
    for seed in range(5):
        answer = await client.post("/v1/txt2img", json={"prompt": PROMPT, "seed": seed}, headers={"Prefer": "wait"})
        made.append(answer.json()["id"])
    page = (await client.get("/v1/jobs", params={"limit": 3})).json()
    assert [job["id"] for job in page["data"]] == made[:1:-1]
    rest = (await client.get("/v1/jobs", params={"limit": 3, "cursor": page["next_cursor"]})).json()
    assert [job["id"] for job in rest["data"]] == made[1::-1]
    assert rest["next_cursor"] is None
    assert (await client.get("/v1/jobs", params={"status": "queued"})).json()["data"] == []


async def test_cancel_and_delete(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    job = (await client.post("/v1/txt2img", json={"prompt": PROMPT})).json()
    early = await client.delete(f"/v1/jobs/{job['id']}")
    assert (early.status_code, early.json()["code"]) == (409, "job_not_ended")
    cancelled = await client.post(job["urls"]["cancel"])
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (await client.post(job["urls"]["cancel"])).status_code == 200
    assert (await client.delete(f"/v1/jobs/{job['id']}")).status_code == 204
    gone = await client.get(job["urls"]["self"])
    assert (gone.status_code, gone.json()["code"]) == (404, "job_not_found")


async def test_cancel_of_a_running_job_reaches_its_worker(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    job = (await client.post("/v1/txt2img", json={"prompt": PROMPT})).json()
    (taken,) = worker.take(8)
    asked = await client.post(job["urls"]["cancel"])
    assert (asked.status_code, asked.json()["status"]) == (202, "running")
    stops = worker.stops([taken])
    assert worker.end_stopped(taken, stops[taken.job_id])
    assert (await client.get(job["urls"]["self"])).json()["status"] == "cancelled"


async def test_an_ended_job_cannot_be_cancelled_and_its_pictures_go_with_it(
    client: httpx.AsyncClient, painter: Any
) -> None:
    job = (await client.post("/v1/txt2img", json={"prompt": PROMPT}, headers={"Prefer": "wait"})).json()
    late = await client.post(job["urls"]["cancel"])
    assert (late.status_code, late.json()["code"]) == (409, "job_ended")
    url = job["images"][0]["url"]
    assert (await client.get(url)).status_code == 200
    assert (await client.delete(job["urls"]["self"])).status_code == 204
    gone = await client.get(url)
    assert (gone.status_code, gone.json()["code"]) == (404, "image_not_found")


async def test_image_urls_cannot_be_made_up(client: httpx.AsyncClient, painter: Any) -> None:
    job = (await client.post("/v1/txt2img", json={"prompt": PROMPT}, headers={"Prefer": "wait"})).json()
    url = httpx.URL(job["images"][0]["url"])
    for changed in (
        url.copy_set_param("expires", "9999999999"),
        url.copy_set_param("signature", "x"),
        url.copy_with(path=url.path.replace("0.png", "1.png")),
        url.copy_with(path="/v1/images/../../../etc/passwd"),
    ):
        refused = await client.get(changed)
        assert refused.status_code in (403, 404), changed
        assert refused.headers["content-type"] == "application/problem+json"


async def test_hanging_up_cancels_only_when_asked(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    for query, expected in (("?cancel_on_disconnect=true", "cancelled"), ("", "queued")):
        with pytest.raises(httpx.ReadTimeout):
            await client.post(
                f"/v1/txt2img{query}", json={"prompt": PROMPT}, headers={"Prefer": "wait=10"}, timeout=0.3
            )
        for _ in range(100):
            newest = (await client.get("/v1/jobs", params={"limit": 1})).json()["data"][0]
            if newest["status"] == expected:
                break
        assert newest["status"] == expected
