"""docs/api.md says what the code says: fields, problems, calls, events, headers, settings."""

import re
from pathlib import Path
from typing import Final, get_args

import pytest

from contract.events import JobEvent
from contract.settings import Settings
from contract.spec import JobStatus, JobWarning, Sampler
from service.app import create_app
from service.cors import cors_options
from service.routes.models import ModelView
from service.schemas import TextToImage
from tests import guide_tables

TEXT: Final = (Path(__file__).resolve().parents[1] / "docs/api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/api.md has no section {title}"
    return found[1]


@pytest.mark.parametrize("name", ["request_fields", "job_fields", "image_fields"])
def test_tables_of_fields_are_those_of_the_schemas(name: str) -> None:
    table = getattr(guide_tables, name)()
    assert table in TEXT, f"docs/api.md: put this in place of the table that was:\n\n{table}\n"


def test_every_problem_has_its_row() -> None:
    rows = re.findall(r"^\| (\d+) \| (`\w+`) \| (.*?) \| (.+) \|$", section("Errors"), re.MULTILINE)
    assert tuple(row[:3] for row in rows) == guide_tables.problems()


def test_every_call_is_listed() -> None:
    for path in create_app(Settings()).openapi()["paths"]:
        assert f"{path}`" in TEXT


def test_events_states_and_warnings_are_named() -> None:
    events = [kind.model_fields["type"].default for kind in get_args(JobEvent)]
    assert first_cells(section("Following a job")) == events
    assert first_cells(section("Jobs"))[-len(JobStatus) :] == list(JobStatus)
    for code in get_args(JobWarning.model_fields["code"].annotation):
        assert f"`{code}`" in section("Jobs")
    for sampler in Sampler:
        assert f"`{sampler}`" in section("Samplers")


def first_cells(text: str) -> list[str]:
    """The names in the first column of tables."""
    return [name for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)]


def test_bodies_are_requests() -> None:
    bodies = re.findall(r"`(\{\".*?\})`(?: \||\.)", section("What a picture shows") + section("Adapters (LoRA)"))
    assert len(bodies) == 6
    for body in bodies:
        TextToImage.model_validate_json(body, strict=True)
    conditioning = get_args(ModelView.model_fields["conditioning"].annotation)
    assert first_cells(section("What a picture shows"))[1:] == list(conditioning)


def test_headers_for_browsers_are_named() -> None:
    options = cors_options(["*"])
    for header in {*options["allow_headers"], *options["expose_headers"]} - {"Content-Type"}:
        assert f"`{header}`" in section("Calling from a browser")


def test_settings_exist() -> None:
    named = set(re.findall(r"`(DARKROOM_\w+)`", TEXT))
    assert named
    assert named <= {f"DARKROOM_{name.upper()}" for name in Settings.model_fields}
