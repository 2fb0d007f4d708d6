"""The reference at `/docs` and `/openapi.json`: what FastAPI cannot see by itself.

The bodies of the four tasks come as JSON or as a form and are read by `body`, so their schemas and examples are put
here; so is the problem document that every refusal is.
"""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from contract.spec import Task
from service.auth import BEARER, KEY_HEADER
from service.body import FORM_TYPE, JSON_TYPE
from service.examples import EXAMPLES
from service.problems import Problem
from service.schemas import JSON_FIELDS, PICTURE_FIELDS, REQUESTS

_KEY_HEADER_SCHEME: Final = "APIKeyHeader"
_REF: Final = "#/components/schemas/{model}"
DESCRIPTION: Final = """
Prompts, masks and small pictures in; pictures out. A `POST` to one of the four tasks makes a job, answered with 202.
Follow it by its events, look at it now and then, or send `Prefer: wait=30` and get it when it has ended.
The pictures are behind the signed URLs of the ended job.

Every refusal is `application/problem+json` (RFC 9457) with a stable `code` and, for validation, one entry per field.
"""


def request_body(task: Task) -> dict[str, Any]:
    """The `requestBody` of one task's operation."""
    name = REQUESTS[task].__name__
    content: dict[str, Any] = {
        JSON_TYPE: {"schema": _ref(name), "examples": EXAMPLES[task]},
        FORM_TYPE: {"schema": _ref(_form_name(name))},
    }
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI) -> None:
    """Replaces the app's `openapi`; built once, at the first look."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    models = [(model, "validation") for model in REQUESTS.values()]
    _, own = models_json_schema([*models, (Problem, "serialization")], ref_template=_REF)  # type: ignore[list-item]
    for name, schema in own["$defs"].items():
        schemas[name] = schema
    for model in REQUESTS.values():
        schemas[_form_name(model.__name__)] = _as_form(schemas[model.__name__])
    _drop_unused_422(document)
    _add_key_header(document)
    return document


def _as_form(schema: dict[str, Any]) -> dict[str, Any]:
    """The same fields as a form has them: pictures are files, lists are JSON text, and nothing is null."""
    properties = {name: _never_null(field) for name, field in schema["properties"].items()}
    for name in PICTURE_FIELDS:
        if name in properties:
            kept = {key: value for key, value in properties[name].items() if key in ("title", "description")}
            properties[name] = kept | {"type": "string", "format": "binary"}
    for name in JSON_FIELDS:
        if name in properties:
            properties[name] = {"type": "string", "description": f"JSON: {properties[name]['description']}"}
    return schema | {"properties": properties, "title": _form_name(schema["title"])}


def _never_null(field: dict[str, Any]) -> dict[str, Any]:
    others = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    if len(others) != 1:
        return field
    kept = {key: value for key, value in field.items() if key != "anyOf" and (key, value) != ("default", None)}
    return {**kept, **others[0]}


def _drop_unused_422(document: dict[str, Any]) -> None:
    """FastAPI documents its own validation error wherever there is a parameter; ours are problems."""
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if "HTTPValidationError" in str(content):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add_key_header(document: dict[str, Any]) -> None:
    """FastAPI knows one way to send a key; wherever that is taken, the header is too."""
    schemes = document["components"]["securitySchemes"]
    schemes[_KEY_HEADER_SCHEME] = {
        "type": "apiKey", "in": "header", "name": KEY_HEADER, "description": "the same key in a header of its own",
    }  # fmt: skip
    for operations in document["paths"].values():
        for operation in operations.values():
            for requirement in operation.get("security", ())[:1]:
                operation["security"].append({_KEY_HEADER_SCHEME: requirement[BEARER]})


def _form_name(name: str) -> str:
    return f"{name}Form"


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}
