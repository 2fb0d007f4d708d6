"""The reference is true: every documented example is sent, and every answer's status is documented."""

from collections.abc import Iterator
from typing import Any

import httpx
from fastapi import FastAPI

from contract.errors import ErrorCode
from contract.settings import Settings
from service.app import create_app

Operation = tuple[str, str, dict[str, Any]]


def operations(document: dict[str, Any]) -> Iterator[Operation]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def examples_of(operation: dict[str, Any]) -> list[Any]:
    """The bodies of the examples; [None] for an operation without a body."""
    content = operation.get("requestBody", {}).get("content", {})
    named = content.get("application/json", {}).get("examples", {})
    return [example["value"] for example in named.values()] or [None]


def parameters_of(operation: dict[str, Any], place: str) -> dict[str, Any]:
    """The first example of each parameter that has one."""
    return {
        parameter["name"]: parameter["schema"].get("examples", [None])[0]
        for parameter in operation.get("parameters", ())
        if parameter["in"] == place and "examples" in parameter["schema"]
    }


async def test_every_example_is_answered_as_documented(client: httpx.AsyncClient, painter: Any) -> None:
    document = (await client.get("/openapi.json")).json()
    done = (await client.post("/v1/txt2img", json={"prompt": "a pizza"}, headers={"Prefer": "wait"})).json()
    sent = 0
    for method, path, operation in operations(document):
        in_path = parameters_of(operation, "path")
        query = parameters_of(operation, "query")
        for body in examples_of(operation):
            for real in (False, True):  # ids as documented, then that of a job that exists
                names = in_path | ({"job_id": done["id"]} if real else {})
                if method == "DELETE" and real:
                    continue
                answer = await client.request(
                    method, path.format(**names), params=query, json=body, headers={"Prefer": "wait=15"}
                )
                sent += 1
                assert str(answer.status_code) in operation["responses"], (method, path, answer.text)
                assert answer.status_code < 500, (method, path, answer.text)
                kinds = operation["responses"][str(answer.status_code)].get("content", {})
                if kinds:
                    assert answer.headers["content-type"].partition(";")[0] in kinds, (method, path)
                if body is not None:
                    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded"), (path, answer.text)
    assert sent > 20


def test_every_operation_and_field_is_described(settings: Settings) -> None:
    document = create_app(settings).openapi()
    for method, path, operation in operations(document):
        assert operation.get("description") or operation.get("summary"), (method, path)
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), (method, path, parameter["name"])
    for name in ("TextToImage", "ImageToImage", "Inpaint", "Upscale"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), (name, field)


def test_every_reference_leads_somewhere(settings: Settings) -> None:
    document = create_app(settings).openapi()

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            part = list(part.values())
        if isinstance(part, list):
            for item in part:
                yield from references(item)

    found = set(references(document))
    names = {reference.removeprefix("#/components/schemas/") for reference in found}
    assert names <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in names


def test_every_problem_is_documented_as_one(settings: Settings) -> None:
    app: FastAPI = create_app(settings)
    statuses = {code.value: code.status for code in ErrorCode}
    for method, path, operation in operations(app.openapi()):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert set(response["content"]) == {"application/problem+json"}, (method, path, status)
                assert ("Retry-After" in response.get("headers", ())) == (status in ("429", "503")), (path, status)
                for code in response["content"]["application/problem+json"]["examples"]:
                    assert str(statuses[code]) == status
