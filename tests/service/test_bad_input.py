"""Each kind of bad input is one problem that names the field and what was expected; nothing gets queued or stored."""

import io
import json
import struct
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError

from broker.worker_side import WorkerBroker
from contract.settings import Settings
from service.schemas import TextToImage

PROMPT = "a pizza on a blue background"
Queued = Callable[[], int]


def png(width: int = 64, height: int = 64, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 50).convert(mode).save(file, "PNG")
    return file.getvalue()


def text(data: bytes) -> str:
    return b64encode(data).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A small PNG file that declares side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 99, 200)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


IMAGE = text(png())
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A bad request, and the one field that its problem names with these words."""

    body: dict[str, Any]
    field: str
    words: str
    task: str = "txt2img"
    status: int = 422
    code: str = "validation_failed"


def numbers(**fields: tuple[Any, str]) -> dict[str, Case]:
    """Each field with a bad value, and the words about it."""
    return {
        f"{field} {value}": Case({"prompt": PROMPT, field: value}, f"/{field}", words)
        for field, (value, words) in fields.items()
    }


def picture(data: bytes | str, words: str, code: str = "image_invalid") -> Case:
    """img2img with this as its image."""
    source = text(data) if isinstance(data, bytes) else data
    return Case({"prompt": PROMPT, "image": source}, "/image", words, "img2img", 422, code)


def inpaint(words: str, code: str = "validation_failed", **fields: Any) -> Case:
    return Case({"prompt": PROMPT, "image": IMAGE} | fields, "/mask", words, "inpaint", 422, code)


def noise(level: Any, words: str, **fields: Any) -> Case:
    body = {"image": IMAGE, "noise_level": level} | fields
    return Case(body, "/noise_level", words, "upscale")


def lora(field: str, words: str, **adapter: Any) -> Case:
    return Case({"prompt": PROMPT, "loras": [adapter]}, f"/loras/0/{field}", words)


CASES = {
    "no prompt": Case({}, "/prompt", "required"),
    "empty prompt": Case({"prompt": ""}, "/prompt", "expected at least 1 character"),
    "blank prompt": Case({"prompt": " \n\t"}, "/prompt", "expected words"),
    "inpaint, empty prompt": Case({"prompt": "", "image": IMAGE, "mask": IMAGE}, "/prompt", "1 character", "inpaint"),
    "null prompt": Case({"prompt": None}, "/prompt", "required"),
    "prompt of a number": Case({"prompt": 5}, "/prompt", "a valid string; got 5"),
    "prompt with NUL": Case({"prompt": "a\0b"}, "/prompt", "NUL"),
    "prompt too long": Case({"prompt": "a" * 4001}, "/prompt", "expected at most 4,000"),
    **numbers(width=(0, "equal to 8; got 0"), height=(10**6, "equal to 16384"), steps=(0, "equal to 1; got 0")),
    **numbers(width=(-64, "equal to 8; got -64"), height=("64", "a valid integer"), steps=(True, "integer; got true")),
    **numbers(width=(257, "expected 8 to 256 pixels"), steps=(2.5, "integer"), n=(0, "equal to 1; got 0")),
    **numbers(steps=(151, "expected at most 150"), n=(9, "expected at most 8"), eta=(2, "equal to 1")),
    **numbers(guidance_scale=(NAN, "a finite number; got NaN"), seed=(-1, "equal to 0; got -1")),
    **numbers(guidance_scale=(INFINITY, "a finite number"), seed=(2**63, "9223372036854775807")),
    **numbers(guidance_scale=(-1, "equal to 0"), seed=(10**400, "9223372036854775807")),
    **numbers(seed=(NAN, "a valid integer; got NaN"), deadline_seconds=(0, "greater than 0")),
    **numbers(sampler=("heun", "'ddim'"), priority=("now", "'interactive' or 'batch'")),
    **numbers(output_format=("gif", "'png', 'jpeg' or 'webp'"), output_quality=(101, "equal to 100")),
    **numbers(class_label=(3, "takes a prompt"), loras=("film", "array")),
    "eta of another sampler": Case({"prompt": PROMPT, "eta": 0.5, "sampler": "euler"}, "/eta", "belongs to ddim"),
    "lora unknown": lora("name", "expected one of: none", name="film"),
    "lora weight": lora("weight", "equal to 4", name="film", weight=9),
    "noise above the model's": noise(351, "expected 0 to 350 for darkroom-small-x4; got 351"),
    "noise above all": noise(1000, "equal to 999; got 1000"),
    "noise below 0": noise(-1, "equal to 0; got -1"),
    "noise in between": noise(1.5, "valid integer"),
    "noise of a model without": noise(0, "of no use to plain-x4, which takes the picture as it is", model="plain-x4"),
    "noise of another task": Case({"prompt": PROMPT, "noise_level": 3}, "/noise_level", "unknown field"),
    "unknown field": Case({"prompt": PROMPT, "step": 5}, "/step", "did you mean steps?"),
    "odd field name": Case({"prompt": PROMPT, "a/b~c": 5}, "/a~1b~0c", "unknown field"),
    "field of another task": Case({"prompt": PROMPT, "image": IMAGE}, "/image", "unknown field"),
    "unknown model": Case(
        {"prompt": PROMPT, "model": "sdxl"}, "/model", "one of: darkroom-small", "txt2img", 404, "model_not_found"
    ),
    "model of another task": Case(
        {"prompt": PROMPT, "model": "darkroom-small-x4"}, "/model", "serves upscale, not txt2img"
    ),
    "strength 0": Case({"prompt": PROMPT, "image": IMAGE, "strength": 0}, "/strength", "greater than 0", "img2img"),
    "image missing": Case({"prompt": PROMPT}, "/image", "required", "img2img"),
    "image null": Case({"prompt": PROMPT, "image": None}, "/image", "base64", "img2img"),
    "no base64": picture("%%%", "not base64"),
    "a link": picture("http://example.com/a.png", "not base64"),
    "data URL of text": picture("data:image/png,abc", "expected data:image/png;base64"),
    "text file": picture(b"hello, this is text\n" * 9, "expected a PNG, JPEG or WebP file"),
    "svg": picture(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected a PNG, JPEG or WebP file"),
    "gif": picture(b"GIF89a" + bytes(50), "expected a PNG, JPEG or WebP file"),
    "truncated png": picture(png()[:-700], "cut off"),
    "first bytes of a png": picture(png()[:20], "cut off"),
    "animation": picture(animation(), "expected a single picture"),
    "bomb of 50,000 × 50,000": picture(bomb(50_000), "sides of at most 4096", "image_too_large"),
    "bomb of 10,000 × 10,000": picture(bomb(10_000), "sides of at most 4096", "image_too_large"),
    "bomb of 5,000 × 5,000": picture(bomb(5_000), "declares 5000×5000", "image_too_large"),
    "above the model's size": picture(png(257, 64), "expected at most 256×256", "image_too_large"),
    "tiny image": picture(png(7, 64), "expected sides of at least 8"),
    "mask missing": inpaint("required"),
    "mask of another size": inpaint("mask is 64×32; expected the image's size, 64×64", mask=text(png(64, 32, "L"))),
    "mask is a bomb": inpaint("sides of at most 4096", "image_too_large", mask=text(bomb(50_000))),
    "upscale above the model's size": Case(
        {"image": text(png(129, 20))},
        "/image",
        "enlarged 516×80; expected at most 128×128",
        "upscale",
        422,
        "image_too_large",
    ),
}


@pytest.fixture(autouse=True)
def _nothing_came_of_it(worker: WorkerBroker, queued: Queued, settings: Settings) -> Iterator[None]:
    """The models are known; after every test here, no job waits and no picture lies in the store."""
    yield
    assert queued() == 0
    assert not [path for path in Path(settings.store_url.removeprefix("file:")).rglob("*") if path.is_file()]


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert (document["status"], document["code"]) == (status, code)
    assert document["title"]
    assert document["request_id"] == answer.headers["x-request-id"]
    return document


async def test_each_bad_field(client: httpx.AsyncClient, queued: Queued) -> None:
    wrong = []
    for name, case in CASES.items():
        content = json.dumps(case.body)  # unlike httpx, writes NaN
        answer = await client.post(f"/v1/{case.task}", content=content, headers={"Content-Type": "application/json"})
        document = problem(answer, case.status, case.code)
        found = {error["pointer"]: error["detail"] for error in document["errors"]}
        if list(found) != [case.field] or case.words not in found[case.field] or queued():
            wrong.append((name, found))
    assert not wrong
    assert len(CASES) > 55


def test_what_was_asked_is_in_no_error_text() -> None:
    """Which a log might show."""
    with pytest.raises(ValidationError) as caught:
        TextToImage.model_validate({"prompt": [PROMPT], "steps": PROMPT})
    assert PROMPT not in str(caught.value)
    assert "steps" in str(caught.value)


async def test_all_faults_come_at_once(client: httpx.AsyncClient) -> None:
    body = {"prompt": "", "steps": 0, "guidance_scale": 101, "colour": "red"}
    document = problem(await client.post("/v1/txt2img", json=body), 422, "validation_failed")
    assert {error["pointer"] for error in document["errors"]} == {"/prompt", "/steps", "/guidance_scale", "/colour"}
    pictures = {"prompt": PROMPT, "image": "AAAA", "mask": text(bomb(50_000))}
    document = problem(await client.post("/v1/inpaint", json=pictures), 422, "image_invalid")
    assert {error["pointer"] for error in document["errors"]} == {"/image", "/mask"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "a", }', "line 1 column 17"),
        (b'{"prompt":\n "a"', "line 2"),
        (b"", "column 0"),
        (b"prompt=a", "column 1"),
        (b'{"prompt": "\xff"}', "column"),
        (b'{"prompt": "\\ud800"}', "column"),
        (b"[" * 10_000, "recursion"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "column"),
    ],
)
async def test_invalid_json_is_told_with_its_place(client: httpx.AsyncClient, body: bytes, words: str) -> None:
    answer = await client.post("/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert words in problem(answer, 400, "invalid_json")["detail"]


async def test_json_that_is_no_object(client: httpx.AsyncClient) -> None:
    document = problem(await client.post("/v1/txt2img", json=["a"]), 422, "validation_failed")
    assert document["errors"][0]["pointer"] == ""
    assert "object" in document["errors"][0]["detail"]


async def test_a_thousand_unknown_fields_make_one_short_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/txt2img", json={f"x{number}": 1 for number in range(50_000)})
    problem(answer, 422, "validation_failed")
    assert len(answer.content) < 2000


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "image/png"])
async def test_another_content_type(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await client.post("/v1/txt2img", content=b'{"prompt": "a"}', headers=headers)
    document = problem(answer, 415, "unsupported_media_type")
    assert document["errors"] == [
        {"header": "Content-Type", "detail": "expected application/json or multipart/form-data"}
    ]


async def test_a_body_of_30_megabytes(client: httpx.AsyncClient) -> None:
    body = b'{"prompt": "' + b"a" * 30_000_000 + b'"}'
    headers = {"Content-Type": "application/json"}
    declared = await client.post("/v1/txt2img", content=body, headers=headers)
    assert "expected at most 20,971,520" in problem(declared, 413, "body_too_large")["detail"]

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1_000_000):
            yield body[start : start + 1_000_000]

    streamed = await client.post("/v1/txt2img", content=pieces(), headers=headers)
    assert "expected at most 20,971,520" in problem(streamed, 413, "body_too_large")["detail"]
    form = await client.post("/v1/upscale", files={"image": bytes(30_000_000)})
    problem(form, 413, "body_too_large")


async def test_bad_forms(client: httpx.AsyncClient) -> None:
    no_boundary = await client.post("/v1/upscale", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert "boundary" in problem(no_boundary, 400, "invalid_multipart")["detail"]
    broken = await client.post(
        "/v1/upscale", content=b"--x\r\nnonsense", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert broken.status_code in (400, 422)

    for fields, files, where, words in (
        ({"prompt": PROMPT, "steps": "many"}, {}, "/steps", "valid integer"),
        ({"prompt": PROMPT, "loras": "[{"}, {}, "/loras", "expected JSON"),
        ({"prompt": PROMPT, "guidance_scale": "nan"}, {}, "/guidance_scale", "finite"),
        ({}, {"prompt": b"a pizza"}, "/prompt", "got a file"),
        ({"prompt": ["one", "two"]}, {}, "/prompt", "given twice"),
    ):
        files = files or {"other": b""}
        answer = await client.post("/v1/txt2img", data=fields, files=files)
        document = problem(answer, 422, "validation_failed")
        found = {error["pointer"]: error["detail"] for error in document["errors"] if error["pointer"] != "/other"}
        assert list(found) == [where], found
        assert words in found[where]
    text_file = await client.post("/v1/upscale", files={"image": ("a.png", b"text", "image/png")})
    assert problem(text_file, 422, "image_invalid")["errors"][0]["pointer"] == "/image"


async def test_no_model_is_known(client: httpx.AsyncClient, redis_client: Any) -> None:
    redis_client.delete("darkroom:models")
    document = problem(await client.post("/v1/txt2img", json={"prompt": PROMPT}), 404, "model_not_found")
    assert "start a worker" in document["errors"][0]["detail"]


async def test_other_addresses_methods_and_parameters(client: httpx.AsyncClient) -> None:
    problem(await client.get("/v1/nothing"), 404, "not_found")
    refused = await client.get("/v1/txt2img")
    problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "POST"
    problem(await client.get("/v1/jobs/nothing"), 404, "job_not_found")
    problem(await client.get("/v1/jobs/a:b"), 404, "job_not_found")
    problem(await client.get("/v1/jobs/%ff%00"), 404, "job_not_found")
    problem(await client.get("/v1/jobs/nothing/events"), 404, "job_not_found")
    problem(await client.post("/v1/jobs/nothing/cancel"), 404, "job_not_found")
    problem(await client.delete("/v1/jobs/nothing"), 404, "job_not_found")
    for query, parameter in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("status=odd", "status"),
        ("cursor=x", "cursor"),
    ):
        document = problem(await client.get(f"/v1/jobs?{query}"), 422, "validation_failed")
        assert document["errors"][0]["parameter"] == parameter
    bad_id = await client.get("/v1/jobs/nothing/events", headers={"Last-Event-ID": "x"})
    assert problem(bad_id, 422, "validation_failed")["errors"][0]["header"] == "last-event-id"
    long_key = await client.post("/v1/txt2img", json={"prompt": PROMPT}, headers={"Idempotency-Key": "k" * 256})
    assert problem(long_key, 422, "validation_failed")["errors"][0]["header"] == "Idempotency-Key"
    odd_flag = await client.post("/v1/txt2img?cancel_on_disconnect=perhaps", json={"prompt": PROMPT})
    assert problem(odd_flag, 422, "validation_failed")["errors"][0]["parameter"] == "cancel_on_disconnect"
