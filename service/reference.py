"""The reference for people at `/docs`: one page made from the OpenAPI document, with nothing loaded from elsewhere.

The usual pages fetch their scripts from other servers, so they are blank where there is no internet.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

Json = Mapping[str, Any]

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc }
nav a { display: block }
table { border-collapse: collapse; margin: .5rem 0 1rem; display: block; overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }
tr { border-bottom: 1px solid #ddd }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
summary { cursor: pointer }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1b1b1b }
  pre { background: #262626 }
  a { color: #8ab4f8 }
}
"""
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "frame-ancestors 'none'"
)


def install(app: FastAPI) -> None:
    """Answers on /docs; made once, at the first look."""
    made: list[str] = []

    def show() -> HTMLResponse:
        if not made:
            made.append(page(app.openapi()))
        return HTMLResponse(made[0], headers={"Content-Security-Policy": POLICY})

    app.add_api_route("/docs", show, methods=["GET", "HEAD"], include_in_schema=False)


def page(document: Json) -> str:
    """HTML of an OpenAPI 3.1 document as FastAPI writes it."""
    calls = [(method, path, call) for path, calls in document["paths"].items() for method, call in calls.items()]
    links = "".join(f'<a href="#{_anchor(method, path)}">{_call(method, path)}</a>' for method, path, _ in calls)
    info = document["info"]
    parts = "".join(_operation(method, path, call, document) for method, path, call in calls)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=width=device-width>"
        f"<title>{escape(info['title'])}</title>"
        f"<style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"{_prose(info['description'])}<p>The same for programs: <a href=openapi.json>openapi.json</a>. "
        "A * marks fields that a request must give, or that an answer always has.</p>"
        f"<nav>{links}</nav>{parts}</html>"
    )


def _operation(method: str, path: str, call: Json, document: Json) -> str:
    schemas = document["components"]["schemas"]
    parts = [f'<h2 id="{_anchor(method, path)}">{_call(method, path)}</h2>', _prose(call.get("summary", ""))]
    if call.get("description", "") != call.get("summary", ""):
        parts.append(_prose(call.get("description", "")))
    parameters = [
        (one["name"], one["in"], _type(one["schema"], schemas), one.get("description", ""))
        for one in call.get("parameters", ())
    ]
    parts.append(_table("Parameters", ("name", "in", "type", "meaning"), parameters))
    for kind, content in call.get("requestBody", {}).get("content", {}).items():
        parts.append(_table(f"Body as {kind}", ("field", "type", "meaning"), list(_fields(content["schema"], schemas))))
        parts += [_example(name, one) for name, one in content.get("examples", {}).items()]
    answers = [(status, answer.get("description", "")) for status, answer in sorted(call["responses"].items())]
    parts.append(_table("Answers", ("status", "meaning"), answers))
    success: Json = next((answer for status, answer in sorted(call["responses"].items()) if status < "300"), {})
    for content in success.get("content", {}).values():
        fields = list(_fields(content.get("schema", {}), schemas))
        parts.append(_table("Fields of the answer", ("field", "type", "meaning"), fields))
    return "".join(parts)


def _fields(schema: Json, schemas: Json) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of an object's fields; required ones are marked."""
    found = schemas[_name(schema)] if "$ref" in schema else schema
    required = found.get("required", ())
    for name, field in found.get("properties", {}).items():
        meaning = field.get("description", "")
        if "default" in field and field["default"] is not None:
            meaning = f"{meaning} (default {json.dumps(field['default'])})"
        yield name + ("*" if name in required else ""), _type(field, schemas), meaning


def _type(schema: Json, schemas: Json) -> str:
    if "$ref" in schema:
        target = schemas[_name(schema)]
        return _type(target, schemas) if "enum" in target else _name(schema)
    if "anyOf" in schema:
        return " or ".join(_type(one, schemas) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    low = schema.get("minimum", schema.get("minLength"))
    high = schema.get("maximum", schema.get("exclusiveMaximum", schema.get("maxLength")))
    parts = [str(schema.get("type", "any"))]
    if low is not None:
        parts.append(f"from {low}")
    if "exclusiveMinimum" in schema:
        parts.append(f"above {schema['exclusiveMinimum']}")
    if high is not None:
        parts.append(f"to {high}")
    return " ".join(parts)


def _name(schema: Json) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _example(name: str, example: Json) -> str:
    text = json.dumps(example["value"], indent=2, ensure_ascii=False)
    title = escape(example.get("summary", name))
    return f"<details><summary>Example: {title}</summary><pre>{escape(text)}</pre></details>"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h3>{escape(title)}</h3><table><tr>{head}</tr>{body}</table>"


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(block)}</p>" for block in text.strip().split("\n\n") if block)


def _inline(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def _call(method: str, path: str) -> str:
    return f"<code>{method.upper()} {escape(path)}</code>"


def _anchor(method: str, path: str) -> str:
    return escape(f"{method}-{path.strip('/').replace('/', '-').replace('{', '').replace('}', '')}")
