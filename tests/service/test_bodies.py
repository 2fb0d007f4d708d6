"""Bodies that are odd in themselves, whatever is in them: refused in a few words, and never held beyond the bound."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from itertools import product
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from starlette.requests import ClientDisconnect, Request

from broker.worker_side import WorkerBroker
from contract.errors import ErrorCode
from contract.settings import Settings
from service.app import create_app
from service.body import Bodies
from service.problems import ProblemError
from service.schemas import REQUESTS, TextToImage
from tests.service.picture_makers import file_of

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
PROMPT = "a pizza on a blue background"
BOUNDARY = "limit"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(head: bytes, value: bytes = b"x") -> bytes:
    return b"--limit\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


def field(name: bytes, value: bytes = b"x") -> bytes:
    return part(b'Content-Disposition: form-data; name="' + name + b'"', value)


async def post(client: httpx.AsyncClient, body: bytes, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The problem of a form, or of another body with its own headers."""
    end = b"--limit--\r\n" if headers is None else b""
    answer = await client.post("/v1/txt2img", content=body + end, headers=headers or FORM)
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert len(answer.content) < 20_000
    document: dict[str, Any] = answer.json()
    assert document["status"] == answer.status_code
    return document


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (field(b"a") * 65, "Too many fields"),
        (part(b'Content-Disposition: form-data; name="a"; filename="b"') * 9, "Too many files"),
        (field(b"n" * 100_000), "Invalid multipart"),
        (part(b'Content-Disposition: form-data; name="a"' + b"\r\nX: y" * 100), "Invalid multipart"),
        (part(b"Content-Disposition: form-data"), "name"),
        (part(b"X: y"), "name"),
        (b"--other\r\n" + field(b"prompt"), "Invalid multipart"),
        (b"", "Invalid multipart"),
    ],
    ids=["fields", "files", "long name", "headers", "no name", "no disposition", "other boundary", "nothing"],
)
async def test_forms_that_are_none(client: httpx.AsyncClient, worker: WorkerBroker, body: bytes, words: str) -> None:
    document = await post(client, body)
    assert document["status"] in (400, 422)
    if document["code"] == "invalid_multipart":
        assert words in document["detail"]
        assert "RFC 7578" in document["detail"]
    else:
        assert not body  # an empty form is one, whose fields are missing


async def test_boundaries_that_are_none(client: httpx.AsyncClient) -> None:
    for boundary in ("", "=", '"', "a" * 71, "ä", "=?utf-8?q?x?=", "x\ty"):
        headers = {b"Content-Type": f"multipart/form-data; boundary={boundary}".encode("latin-1")}
        answer = await client.post("/v1/txt2img", content=field(b"prompt"), headers=headers)
        assert (answer.status_code, answer.json()["code"]) in ((400, "invalid_multipart"), (422, "validation_failed"))


@pytest.mark.parametrize("charset", ["utf-8", "idna", "undefined", "unicode_escape", "hex", "punycode", "latin-1"])
async def test_text_of_a_form_is_utf_8_whatever_charset_it_names(
    client: httpx.AsyncClient, worker: WorkerBroker, charset: str
) -> None:
    headers = {"Content-Type": f"multipart/form-data; charset={charset}; boundary={BOUNDARY}"}
    for value, valid in (("pizza 🍕".encode(), True), (b"pizza \xff", False), (b"\xed\xa0\x80", False)):
        answer = await client.post("/v1/txt2img", content=field(b"prompt", value) + b"--limit--\r\n", headers=headers)
        if valid:
            assert (answer.status_code, answer.json()["request"]["prompt"]) == (202, "pizza 🍕")
        else:
            (error,) = answer.json()["errors"]
            assert (answer.status_code, error["pointer"]) == (422, "/prompt")
            assert "expected text in UTF-8" in error["detail"]


@pytest.mark.parametrize("filename", [b"", b"; filename*=UTF-8''gr%C3%B6%C3%9Fe.png", "; filename=größe.png".encode()])
async def test_a_picture_is_a_file_however_its_part_says_so(
    client: httpx.AsyncClient, worker: WorkerBroker, filename: bytes
) -> None:
    picture = file_of(Image.new("RGB", (16, 16)))
    form = part(b'Content-Disposition: form-data; name="image"' + filename + b"\r\nContent-Type: image/png", picture)
    answer = await client.post("/v1/upscale", content=form + b"--limit--\r\n", headers=FORM)
    assert answer.status_code == 202, answer.text


async def test_long_and_odd_names_are_not_repeated_at_length(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    json_type = {"Content-Type": "application/json"}
    for body, headers in (
        (json.dumps({"prompt": PROMPT, "n" * 1_000_000: 1}).encode(), json_type),
        (json.dumps({"prompt": PROMPT, "steps": "9" * 1_000_000}).encode(), json_type),
        (json.dumps({"prompt": PROMPT, **{f"{i}" + "n" * 9999: 1 for i in range(49)}}).encode(), json_type),
        (field(b"prompt") + field(b"n" * 4000), None),
        (field(b"prompt") + field(b"\xff\xed\xa0\x80"), None),
    ):
        document = await post(client, body, headers)
        assert (document["status"], document["code"]) == (422, "validation_failed")


@pytest.mark.parametrize("value", [b"{}", b"1", b"[1]", b"[[1],2]"], ids=["objects", "numbers", "lists", "mixed"])
async def test_millions_of_values_are_refused_unread(
    client: httpx.AsyncClient, worker: WorkerBroker, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated one by one they took 3.6 GB and ten seconds in which nobody else was served."""
    many = b",".join([value] * 1_000_000)

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("they were read")

    with monkeypatch.context() as patched:
        patched.setattr(TextToImage, "model_validate_json", unexpected)
        for field_name in (b"layout", b"loras", b"prompt"):
            body = b'{"' + field_name + b'":[' + many + b"]}"
            document = await post(client, body, {"Content-Type": "application/json"})
            assert (document["status"], document["code"]) == (422, "validation_failed")
            assert "more than 20,000 values" in document["errors"][0]["detail"]
    words = ", ".join(["pizza"] * 1000)
    layout = [{"label": 1, "box": [0.1, 0.2, 0.3, 0.4], "group": True, "inside": True} for _ in range(100)]
    body = json.dumps({"prompt": words[:4000], "negative_prompt": words[:4000], "layout": layout}).encode()
    document = await post(client, body, {"Content-Type": "application/json"})
    assert "more than 20,000 values" not in str(document)  # the largest that somebody may mean


async def test_json_inside_a_form(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    for value, words in (
        (b"[" * 60_000, "recursion"),
        (b"[" + b"1," * 60_000 + b"1]", "at most 65,536"),
        (b"9" * 5000, "integer string"),
        (b"[NaN]", "got NaN"),
    ):
        document = await post(client, field(b"prompt") + field(b"loras", value))
        assert document["status"] == 422
        assert words in document["errors"][0]["detail"], document


async def test_encoded_bodies_are_refused(client: httpx.AsyncClient) -> None:
    for coding in ("gzip", "br", "deflate", "identity, gzip", "\x7f", "é"):
        headers = {b"Content-Type": b"application/json", b"Content-Encoding": coding.encode("latin-1")}
        answer = await client.post("/v1/txt2img", content=b"\x1f\x8b\x08", headers=headers)
        assert answer.status_code == (400 if coding == "\x7f" else 415), coding  # 400: no header at all
        if answer.status_code == 415:
            assert answer.headers["accept-encoding"] == "identity"
            assert answer.json()["errors"][0]["header"] == "Content-Encoding"


async def test_the_last_of_two_equal_fields_counts(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    body = b'{"prompt": "a", "seed": 1, "prompt": "b", "seed": 2}'
    answer = await client.post("/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert (answer.json()["request"]["prompt"], answer.json()["request"]["seed"]) == ("b", 2)


async def raw(url: str, request: bytes) -> bytes:
    """What the gateway says to these bytes until it closes."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    writer.write(request)
    await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


END = b"\r\nConnection: close\r\n\r\n"


ODD_HEADS: Final = (
    b"Content-Length: -1",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: " + b"9" * 5000,
    b"Content-Length: 1",
    b"Content-Length: 2\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Content-Length: 2\r\nIdempotency-Key: \xff\xfe",
    b"Content-Length: 2\r\nAuthorization: Bearer \xff\xfe",
    b"Content-Length: 2\r\nX-API-Key: \xed\xa0\x80",
    b"Content-Length: 2\r\nPrefer: wait=\xff",
    b"Content-Length: 2\r\nX-Request-ID: \xff",
    b"Content-Length: 2\r\nHost: [",
    b"Content-Length: 2\r\nHost: \xff:99999999",
)


async def test_odd_heads_are_never_a_server_error(url: str, worker: WorkerBroker) -> None:
    paths = (b"/v1/txt2img", b"/v1/\xff%ff%00", b"/v1/jobs?cursor=%ff%00&limit=\xff", b"//[x")
    for head, path in product(ODD_HEADS, paths):
        lines = b"\r\n".join((b"POST " + path + b" HTTP/1.1", b"Content-Type: application/json", head))
        answer = await raw(url, lines + END + b"{}")
        assert 400 <= int(answer.split(b" ", 2)[1]) < 500, answer


async def test_odd_event_ids_are_never_a_server_error(url: str, worker: WorkerBroker) -> None:
    for value in (b"\xff", b"1-\xff", "٣-٣".encode(), b"9" * 19, b"1" * 10_000, b"", b"0-0\xa0"):
        answer = await raw(url, b"GET /v1/jobs/x/events HTTP/1.1\r\nHost: a\r\nLast-Event-ID: " + value + END)
        assert int(answer.split(b" ", 2)[1]) in (400, 404, 422), answer


async def test_who_promises_more_than_comes_gets_no_job(
    url: str, client: httpx.AsyncClient, worker: WorkerBroker, queued: Callable[[], int]
) -> None:
    for head in (b"Content-Length: 9999999", b"Transfer-Encoding: chunked"):
        _, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        body = b'7\r\n{"promp\r\n' if b"chunked" in head else b'{"prompt": "a"}'
        writer.write(b"POST /v1/txt2img HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + head)
        writer.write(b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    assert (await client.get("/healthz")).status_code == 200
    assert queued() == 0


async def test_bodies_that_wait_are_bounded(settings: Settings, serving: Serving, worker: WorkerBroker) -> None:
    """While one large body is on its way, another that would go beyond the bound gets a 429; small ones pass."""
    tight = settings.model_copy(update={"max_held_bytes": 1_000_000})
    json_type = {"Content-Type": "application/json"}
    going_on = asyncio.Event()
    begun = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt": "' + b"a" * 700_000
        begun.set()
        await going_on.wait()
        yield b'"}'

    async with serving(tight) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        assert (await http.get("/v1/models")).status_code == 200  # connected: bodies come in their order
        first = asyncio.create_task(http.post("/v1/txt2img", content=slow(), headers=json_type))
        await begun.wait()
        large = b'{"prompt": "' + b"a" * 700_000 + b'"}'
        second = await http.post("/v1/txt2img", content=large, headers=json_type)
        while second.status_code == 422:  # the first one's bytes have not arrived
            second = await http.post("/v1/txt2img", content=large, headers=json_type)
        assert (second.status_code, second.json()["code"], second.headers["retry-after"]) == (429, "uploads_busy", "2")
        assert (await http.post("/v1/txt2img", json={"prompt": PROMPT})).status_code == 202
        going_on.set()
        assert (await first).status_code == 422  # too long a prompt
        assert (await http.post("/v1/txt2img", content=large, headers=json_type)).status_code == 422


async def test_whatever_ends_a_body_gives_its_bytes_back() -> None:
    bodies = Bodies(10_000_000, 1_000_000)
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def read(*came: dict[str, Any]) -> None:
        messages[:] = came
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        with bodies.share(None) as share:
            await share.read(Request(scope, receive), TextToImage)
            assert bodies.held > 0

    body = {"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}
    await read(body)
    with pytest.raises(ProblemError):
        await read(body | {"body": b"{"})
    with pytest.raises(ClientDisconnect):
        await read(body | {"more_body": True}, {"type": "http.disconnect"})
    with pytest.raises(ProblemError):
        await read(body | {"body": bytes(1_000_001)})
    assert bodies.held == 0


async def test_whole_numbers_may_have_a_point(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    """As JSON Schema has it, and with it the reference."""
    body = {"prompt": PROMPT, "steps": 4.0, "seed": 7.0, "n": 1.0, "width": 64.0, "output_quality": 1e1}
    request = (await client.post("/v1/txt2img", json=body)).json()["request"]
    assert {name: request[name] for name in body} == body
    for steps in (4.5, "4", True, 1e300):
        assert (await client.post("/v1/txt2img", json=body | {"steps": steps})).status_code == 422


def test_bounds_are_documented_as_json_schema_has_them(settings: Settings) -> None:
    names: set[str] = set()

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            names.update(part)
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            collect(value)

    schemas = create_app(settings).openapi()["components"]["schemas"]
    for task in REQUESTS.values():
        collect(schemas[task.__name__]["properties"])
    assert {"minimum", "maximum", "exclusiveMinimum"} <= names
    assert not names & {"ge", "gt", "le", "lt"}


async def test_one_key_does_not_hold_all_of_it() -> None:
    bodies = Bodies(10_000_000, 1_000_000)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    body = b'{"prompt": "a"' + b" " * 300_000 + b"}"

    def request() -> Request:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        return Request(scope, receive)

    with bodies.share("painters") as first, bodies.share("painters") as second, bodies.share("others") as third:
        await first.read(request(), TextToImage)
        with pytest.raises(ProblemError) as refused:
            await second.read(request(), TextToImage)
        assert refused.value.code is ErrorCode.UPLOADS_BUSY
        await third.read(request(), TextToImage)
    assert bodies.held == 0


async def test_a_byte_order_mark_before_json_is_no_fault(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    body = b'\xef\xbb\xbf{"prompt": "a pizza"}'
    answer = await client.post("/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 202
