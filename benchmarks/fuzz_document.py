"""Schemathesis against a running service: what its own OpenAPI document says, and what it does not."""

from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.core.failures import FailureGroup
from schemathesis.engine import events, from_schema
from schemathesis.openapi import from_url
from schemathesis.schemas import BaseSchema

from contract.spec import Task
from service.body import FORM_TYPE
from tests.hostile import hostile_files, sendable_files

EXCLUDED: Final = {
    "positive_data_acceptance": "the document cannot tell what a picture is, what one server and one model take "
    "(sizes, steps, adapters, what a model is conditioned on), or that eta belongs to one sampler",
}
"""Schemathesis' checks that are left out, with the reason; all others run."""

_ANSWERS: Final = (
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
)  # fmt: skip
_PICTURES: Final = {
    Task.TXT2IMG: (),
    Task.IMG2IMG: ("image",),
    Task.INPAINT: ("image", "mask"),
    Task.UPSCALE: ("image",),
}
_LEFT_OUT: Final = ("model", "loras", "class_label", "layout", "semantic_map", "deadline_seconds")


@dataclass
class Outcome:
    """Cases by operation and status; what broke a check, once each."""

    cases: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def note(self, operation: str, check: str, text: str) -> None:
        self.faults.setdefault((operation, check), text)

    def accepted(self, operation: str) -> int:
        return self.cases[operation, 202] + self.cases[operation, 200]

    def server_errors(self) -> int:
        return sum(count for (_, status), count in self.cases.items() if status >= 500)


class Fuzzer:
    """All that is sent to the service at `url` with `key`; `outcome` grows with every call."""

    def __init__(self, url: str, key: str, examples: int, seed_number: int, edges: bool) -> None:
        self.outcome = Outcome()
        self._examples = examples
        self._seed = seed_number
        self._headers = {"Authorization": f"Bearer {key}"}
        config = schemathesis.Config.from_dict(
            {
                "seed": seed_number,
                "continue-on-failure": True,
                "headers": self._headers,
                "generation": {"max-examples": examples, "database": "none", "mode": "all"},
                "phases": {name: {"enabled": edges} for name in ("coverage", "stateful")},
                "checks": {name: {"enabled": False} for name in EXCLUDED},
            }
        )
        self._schema: BaseSchema = from_url(f"{url}/openapi.json", config=config)

        @self._schema.hook
        def after_call(_context: object, case: Case[Any], response: Response) -> None:
            self.outcome.cases[case.operation.label, response.status_code] += 1

    def by_document(self) -> None:
        """Every phase that schemathesis has: examples, the edges of every schema, random and wrong data, and chains of
        calls in which one uses what another gave."""
        for event in from_schema(self._schema).execute():
            if isinstance(event, events.ScenarioFinished):
                for checks in event.recorder.checks.values():
                    for check in checks:
                        if check.failure_info is not None:
                            failure = check.failure_info.failure
                            text = f"{failure.title}\n{failure.message}\n{check.failure_info.code_sample}"
                            self.outcome.note(str(failure.operation), check.name, text)
            elif isinstance(event, events.NonFatalError | events.FatalError):
                self.outcome.note("schemathesis", type(event).__name__, str(event))

    def by_jobs(self) -> None:
        """Requests that the document allows, cut down to what this server takes, with pictures that are some: most of
        them become jobs."""
        for task in Task:
            self._send(task, sendable_files)

    def by_pictures(self) -> None:
        """The same, with one picture as an enemy sends it."""
        for task in (Task.IMG2IMG, Task.INPAINT, Task.UPSCALE):
            self._send(task, lambda _width, _height: hostile_files())

    def _send(self, task: Task, pictures: Callable[[int, int], st.SearchStrategy[bytes]]) -> None:
        size = (24, 16) if task is Task.UPSCALE else (64, 48)
        whole, other = sendable_files(*size), pictures(*size)
        names = _PICTURES[task]

        @seed(self._seed)
        @settings(
            max_examples=self._examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(self._schema[f"/v1/{task.value}"]["POST"].as_strategy(GenerationMode.POSITIVE), st.data())
        def send_one(case: Case[Any], data: st.DataObject) -> None:
            assert isinstance(case.body, dict)  # what the document asks for
            body = _within_limits(case.body, data)
            case.headers.pop("idempotency-key", None)  # drawn ones are short and meet again
            special = data.draw(st.sampled_from(names or ("none",)))
            for name in names:
                picture = data.draw(other if name == special else whole)
                body[name] = picture if case.media_type == FORM_TYPE else b64encode(picture).decode()
            case.body = body
            self._call(case)

        send_one()

    def _call(self, case: Case[Any]) -> None:
        response = case.call(headers=self._headers)
        try:
            case.validate_response(response, checks=list(_ANSWERS), headers=self._headers)
        except FailureGroup as group:
            for failure in group.exceptions:
                self.outcome.note(case.operation.label, type(failure).__name__, f"{failure}\n{response.text[:500]}")


def _within_limits(body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """What a small server and any text model take; the rest stays as it was drawn."""
    body = {name: value for name, value in body.items() if name not in _LEFT_OUT}
    if body.get("sampler", "ddim") != "ddim":
        body.pop("eta", None)
    if not body.get("prompt"):
        body["prompt"] = "a pizza"
    limits = {"steps": (1, 4), "n": (1, 2), "width": (8, 128), "height": (8, 128)}
    return body | {name: data.draw(st.integers(*limits[name])) for name in limits if name in body or name == "steps"}
