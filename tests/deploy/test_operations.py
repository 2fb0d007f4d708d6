"""docs/operations.md names what there is: services, values of the chart, settings, files and its own sections.

That every alert has its section is held with the alerts."""

import re
from typing import Any, Final

from tests.deploy.files import ROOT, SETTINGS, compose, values

TEXT: Final = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
HEADINGS: Final = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_to_sections_lead_somewhere() -> None:
    targets = set(re.findall(r"\]\(#([\w-]+)\)", TEXT))
    assert targets
    assert targets <= {anchor(heading) for heading in HEADINGS}


def test_settings_exist() -> None:
    of_compose = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\b(DARKROOM_[A-Z_]+[A-Z]|WORKER_[A-Z]+|TORCH_[A-Z_]+[A-Z])\b", TEXT))
    assert named - SETTINGS - of_compose == {"TORCH_INDEX_URL"}


def test_compose_commands_name_its_services() -> None:
    services = set(compose()["services"])
    lines = re.findall(r"^docker compose (.+?)(?:\s+#.*)?$", TEXT, re.MULTILINE)
    named = {
        word.split("=")[0].split(":")[0]
        for line in lines
        for word in line.split()
        if word.startswith(("worker", "gateway"))
    }
    assert {"worker", "gateway"} <= named <= services
    profiles = set(re.findall(r"--profile (\w+)", TEXT))
    assert profiles == {name for one in compose()["services"].values() for name in one.get("profiles", ())}


def test_values_of_the_chart_exist() -> None:
    dotted = re.findall(r"--set ([\w.]+)=", TEXT) + re.findall(r"`(worker\.[a-z]\w+)`", TEXT)
    assert "worker.loadSeconds" in dotted
    for path in dotted:
        place: Any = values()
        for part in path.split("."):
            place = place[part]
    for name in ("steps", "minReplicas", "maxReplicas"):
        assert f"{name}" in TEXT
        assert name in values()["workers"][0]["autoscaling"]
