"""The models of this machine: folders in the model directory, each with its card. Needs no torch."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, NamedTuple

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

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


def _is_entry(name: str) -> bool:
    """Whether it names something in a folder, and nothing outside."""
    return name not in ("", ".", "..") and Path(name).name == name


def _entry(name: str) -> str:
    if not _is_entry(name):
        raise ValueError("expected the name of something in the folder")
    return name


class _Note(BaseModel):
    """What NOTE holds."""

    kind: str
    source: str
    entries: tuple[Annotated[str, AfterValidator(_entry)], ...]


def registered(model_dir: Path) -> list[Entry]:
    """By name. Raises RegistryError for a card that cannot be read."""
    entries = []
    for path in sorted(model_dir.glob(f"[!.]*/{CARD}")):  # a name with a dot before it is of one being added
        note = _note(path.parent)
        entries.append(Entry(read_card(path), "" if note is None else f"{note.kind} {note.source}"))
    return entries


def read_card(path: Path) -> ModelCard:
    """Raises RegistryError for what is no card."""
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RegistryError(f"{path} is no model card: {error}") from error


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
    entries = tuple(sorted(path.name for path in folder.iterdir()))
    note = _Note(kind=kind, source=str(source.resolve()), entries=entries)
    (folder / NOTE).write_text(note.model_dump_json(indent=2) + "\n", encoding="utf-8")


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
    note = _note(folder) if _is_entry(name) and not folder.is_symlink() else None
    if note is None:
        added = ", ".join(entry.card.name for entry in registered(model_dir) if entry.source) or "none"
        raise RegistryError(f"{folder} was not made by `darkroom models add`, which made: {added}")
    for entry in (*note.entries, _MEASURED, NOTE):
        path = folder / entry
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    left = sorted(path.name for path in folder.iterdir())
    if not left:
        folder.rmdir()
    return left


def _note(folder: Path) -> _Note | None:
    try:
        return _Note.model_validate_json((folder / NOTE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RegistryError(f"{folder / NOTE} is not what `darkroom models add` writes: {error}") from error
