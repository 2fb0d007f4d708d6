"""Schemathesis against a running service: what its own OpenAPI document says, and what it does not."""

from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
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
from service.body import FORM_TYPE, JSON_TYPE
from tests.hostile import hostile_files, sendable_files, whole_files

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
    """Cases by operation and status; what broke a check, once each; hostile pictures by their digest, and whether the
    last request with it was taken."""

    cases: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    pictures: dict[bytes, bool] = field(default_factory=dict)

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
        """Requests that the document allows, cut down to what this server takes, with pictures that are whole: they
        become jobs."""
        for task in Task:
            operation = self._schema[f"/v1/{task.value}"]["POST"]
            pictures = sendable_files(24, 16) if task is Task.UPSCALE else sendable_files(64, 48)
            requests = operation.as_strategy(GenerationMode.POSITIVE)
            self._run(self._send_job, st.just(_PICTURES[task]), requests, pictures, st.data())

    def _send_job(self, names: Sequence[str], case: Case[Any], picture: bytes, data: st.DataObject) -> None:
        assert isinstance(case.body, dict)  # what the document asks for
        case.body = _within_limits(case.body, data) | {name: _sent(picture, case.media_type) for name in names}
        case.headers.pop("idempotency-key", None)  # drawn ones are short and meet again
        self._call(case)

    def by_pictures(self) -> None:
        """One picture as an enemy sends it, to inpaint beside one that is whole."""
        for task in (Task.IMG2IMG, Task.INPAINT, Task.UPSCALE):
            names = st.sampled_from(_PICTURES[task])
            self._run(
                self._send_picture, st.just(task), names, hostile_files(), st.sampled_from((JSON_TYPE, FORM_TYPE))
            )

    def _send_picture(self, task: Task, name: str, picture: bytes, media_type: str) -> None:
        files = dict.fromkeys(_PICTURES[task], whole_files()[0]) | {name: picture}
        body: dict[str, Any] = {key: _sent(file, media_type) for key, file in files.items()}
        body |= {"prompt": "a pizza", "steps": 1}
        case = self._schema[f"/v1/{task.value}"]["POST"].Case(body=body, media_type=media_type)
        status = self._call(case)
        self.outcome.pictures[sha256(picture).digest()] = status < 400

    def _run(self, send: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
        """Without shrinking: every fault is kept with its request, and all that follow are sent all the same."""
        limits = settings(
            max_examples=self._examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        @seed(self._seed)
        @limits
        @given(st.tuples(*strategies))
        def send_one(drawn: tuple[Any, ...]) -> None:
            send(*drawn)

        send_one()

    def _call(self, case: Case[Any]) -> int:
        """The status of the answer, which is held against the document."""
        response = case.call(headers=self._headers)
        try:
            case.validate_response(response, checks=list(_ANSWERS), headers=self._headers)
        except FailureGroup as group:
            for failure in group.exceptions:
                self.outcome.note(case.operation.label, type(failure).__name__, f"{failure}\n{response.text[:500]}")
        return int(response.status_code)


def _sent(picture: bytes, media_type: str | None) -> bytes | str:
    return picture if media_type == FORM_TYPE else b64encode(picture).decode()


def _within_limits(body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """What a small server and any text model take; the rest stays as it was drawn."""
    body = {name: value for name, value in body.items() if name not in _LEFT_OUT}
    if body.get("sampler", "ddim") != "ddim":
        body.pop("eta", None)
    if not body.get("prompt"):
        body["prompt"] = "a pizza"
    limits = {"steps": (1, 4), "n": (1, 2), "width": (8, 128), "height": (8, 128), "noise_level": (0, 300)}
    return body | {name: data.draw(st.integers(*limits[name])) for name in limits if name in body or name == "steps"}
