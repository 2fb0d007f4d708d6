"""The tables of docs/api.md, as the code has them: what requests may say and what jobs tell."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from contract.errors import ErrorCode
from contract.spec import Task
from service.jobs_view import ImageView, JobView
from service.schemas import REQUESTS, PictureRequest

Schema = Mapping[str, Any]


def request_fields() -> str:
    """One row per field and meaning; those of single tasks come first, the most used of them at the top."""
    tasks_of: dict[tuple[str, str, str, str], list[Task]] = {}
    for task in Task:
        schema = REQUESTS[task].model_json_schema()
        for name, field in schema["properties"].items():
            required = name in schema.get("required", ())
            default = "required" if required else _default(field)
            row = (f"`{name}`", kind_of(field, schema), default, meaning_of(field, schema))
            tasks_of.setdefault(row, []).append(task)
    common = [f"`{name}`" for name in PictureRequest.model_fields]
    rows = sorted(
        tasks_of, key=lambda row: (row[0] in common, row[0] != "`prompt`", row[0] not in ("`image`", "`mask`"))
    )
    tasks = {row: "all" if len(tasks_of[row]) == len(Task) else ", ".join(tasks_of[row]) for row in rows}
    return _table(("field", "of", "type", "default", "meaning"), ((row[0], tasks[row], *row[1:]) for row in rows))


def job_fields() -> str:
    return _fields_of(JobView)


def image_fields() -> str:
    return _fields_of(ImageView)


def problems() -> tuple[tuple[str, str, str], ...]:
    """Status, code and summary."""
    return tuple((str(code.status), f"`{code.value}`", code.summary) for code in ErrorCode)


def kind_of(field: Schema, schema: Schema) -> str:
    """The type in words; null is left out, since it says the same as leaving out the field."""
    if "$ref" in field:
        target = schema["$defs"][field["$ref"].rpartition("/")[2]]
        if "enum" in target:
            return ", ".join(f"`{value}`" for value in target["enum"])
        return "{" + ", ".join(f"`{name}`" for name in target["properties"]) + "}"
    if "anyOf" in field:
        return " or ".join(kind_of(one, schema) for one in field["anyOf"] if one != {"type": "null"})
    if "const" in field:
        return f'`"{field["const"]}"`'
    if "contentEncoding" in field:
        return "picture"
    if field["type"] == "array":
        most = f"up to {field['maxItems']} " if "maxItems" in field else ""
        return f"list of {most}{kind_of(field['items'], schema)}"
    return f"{field['type']}{''.join(_bounds(field))}"


def meaning_of(field: Schema, schema: Schema) -> str:
    target = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
    text = field.get("description") or ("" if "enum" in target else target.get("description", ""))
    return " ".join(text.split()).replace("|", "\\|")


def _bounds(field: Schema) -> Iterator[str]:
    for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to")):
        if key in field:
            yield f" {word} {_number(field[key])}"
    if "maxLength" in field:
        yield f", at most {field['maxLength']} characters"


def _number(value: float) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:g}" if value < 1e5 else f"{value:.0f}"


def _default(field: Schema) -> str:
    value = field.get("default")
    return "" if value in (None, "", []) else f"`{json.dumps(value)}`"


def _fields_of(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = ((f"`{name}`", kind_of(one, schema), meaning_of(one, schema)) for name, one in schema["properties"].items())
    return _table(("field", "type", "meaning"), rows)


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, "|" + "---|" * len(header), *others])
