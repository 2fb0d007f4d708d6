"""The models of this machine: folders in the model directory, each with its card. Needs no torch."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from contract.card import ModelCard
from contract.spec import Name

CARD: Final = "card.json"
NOTE: Final = "added.json"
"""In folders that `darkroom models add` made: where the model came from, and what it put there."""
_MEASURED: Final = "calibration.json"


class RegistryError(ValueError):
    """A model cannot be added or removed; the text says why."""


class Entry(NamedTuple):
    card: ModelCard
    source: str


def registered(model_dir: Path) -> list[Entry]:
    """By name. Raises RegistryError for a card that cannot be read."""
    entries = []
    for path in sorted(model_dir.glob(f"*/{CARD}")):
        try:
            card = ModelCard.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise RegistryError(f"{path} is no model card: {error}") from error
        note = _note(path.parent)
        entries.append(Entry(card, "" if note is None else f"{note['kind']} {note['source']}"))
    return entries


@contextmanager
def new_folder(model_dir: Path, name: str) -> Iterator[Path]:
    """A folder that becomes `model_dir`/`name` when all went well, and leaves nothing behind otherwise.

    Raises RegistryError for a name that cannot be used.
    """
    target = model_dir / check_name(model_dir, name)
    model_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=model_dir))
    try:
        yield folder
        folder.chmod(0o755)
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder)
        raise


def check_name(model_dir: Path, name: str) -> str:
    """Raises RegistryError for a name that is in use or no name."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise RegistryError(
            f"{name!r} cannot be a model's name: expected letters, digits, dots, dashes and underscores, at most 100"
        ) from error
    if os.path.lexists(model_dir / name):
        raise RegistryError(f"{model_dir / name} exists: choose another name, or `darkroom models remove {name}` first")
    return name


def write_note(folder: Path, kind: str, source: Path) -> None:
    """To be written last: all that is there by now is what `remove` deletes. `kind`: converted, or a reference to."""
    entries = sorted(path.name for path in folder.iterdir())
    note = {"kind": kind, "source": str(source.resolve()), "entries": entries}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def link(folder: Path, source: Path, names: Sequence[str]) -> None:
    """Entries of `source` as links in `folder`."""
    for name in names:
        if (source / name).exists():
            (folder / name).symlink_to((source / name).resolve())


def remove(model_dir: Path, name: str) -> list[str]:
    """Deletes what `add` has made, and measurements of it; what else the folder holds stays and is returned.

    Raises RegistryError for a model that `add` has not made.
    """
    folder = model_dir / name
    note = _note(folder) if Path(name).name == name else None
    if note is None:
        added = ", ".join(entry.card.name for entry in registered(model_dir) if entry.source) or "none"
        raise RegistryError(f"{folder} was not made by `darkroom models add`, which made: {added}")
    for entry in (*note["entries"], _MEASURED, NOTE):
        path = folder / Path(entry).name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    left = sorted(path.name for path in folder.iterdir())
    if not left:
        folder.rmdir()
    return left


def _note(folder: Path) -> dict[str, Any] | None:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RegistryError(f"{folder / NOTE} is not JSON: {error}") from error
    return dict(note)
