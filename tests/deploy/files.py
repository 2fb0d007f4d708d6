"""What is deployed, as data: the Dockerfile's instructions, the compose file, and what settings there are."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from contract.settings import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
CHART: Final = ROOT / "deploy/helm/darkroom"
SETTINGS: Final = {f"DARKROOM_{name.upper()}" for name in Settings.model_fields}
OF_THE_COMMAND: Final = {"DARKROOM_MODEL_DIR"}
"""Read by the command line (cli/options.py), not by the settings."""


class Instruction(NamedTuple):
    word: str
    text: str


def defaults(text: str) -> str:
    """`text` with ${NAME:-default} filled in, and some secret for ${NAME:?message}."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", re.sub(r"\$\{\w+:\?[^}]*\}", "5ec2e7", text))


def stages() -> dict[str, list[Instruction]]:
    """Of the Dockerfile, by name; each begins with its FROM. Comments and the
    arguments before the first stage are left out, continued lines joined, defaults of FROM filled in."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            rest = defaults(rest)
            current = found[rest.split()[-1]] = []
        if found:
            current.append(Instruction(word, rest.strip()))
    return found


def compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def values() -> Any:
    return yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def check_schema(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`check-jsonschema`, which brings the published schema of compose files with it."""
    return run([str(Path(sys.executable).with_name("check-jsonschema")), "--no-cache", *map(str, arguments)])


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, **options)


def exact(image: str) -> bool:
    """Whether the tag names one release: nothing that moves from version to version."""
    return re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+(-[a-z]+)*", image) is not None
