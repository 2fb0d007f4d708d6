"""The documentation matches the code: commands, make targets, links and settings."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from cli.main import app
from contract.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "weights").glob("*.md")])
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def code_lines(page: Path) -> list[str]:
    """Lines of fenced blocks, comments cut off, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_darkroom_commands_exist(name: str) -> None:
    """Every `darkroom ...` line names a command and options that it has."""
    group = typer.main.get_command(app)
    for line in code_lines(ROOT / name):
        if not line.startswith("darkroom "):
            continue
        command = group
        words = shlex.split(line)[1:]
        while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
            found = command.get_command(typer.Context(command), words[0])
            assert found is not None, f"{line}: no command {words[0]}"
            command, words = found, words[1:]
        used = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert used <= known | {"--help"}, line


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {line.split()[1] for line in code_lines(ROOT / name) if re.match(r"make [a-z]", line)}
    assert used <= targets


def test_every_setting_is_documented() -> None:
    """docs/settings.md has one row per setting, with its default and its description."""
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        assert f"| `DARKROOM_{name.upper()}` | {default} | {field.description} |" in text
    rows = re.findall(r"^\| `DARKROOM_", text, re.MULTILINE)
    assert len(rows) == len(Settings.model_fields), "docs/settings.md has a setting that the code lacks"
