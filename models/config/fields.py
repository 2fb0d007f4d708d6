"""What the configs share: reading known fields, refusing unknown ones, checking dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


class UnsupportedStructure(ValueError):
    """A config asks for something that these modules do not implement."""


def known_fields(cls: type[Any], data: Mapping[str, Any], off: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The dataclass fields in `data`; every other key must be private or stand in `off` with an allowed value."""
    names = {field.name for field in dataclasses.fields(cls)}
    for key, value in data.items():
        if key in names or key.startswith("_"):
            continue
        if key not in off or value not in off[key]:
            allowed = " or ".join(map(repr, off[key])) if key in off else "its absence"
            raise UnsupportedStructure(f"{cls.__name__}: {key}={value!r} is not supported; expected {allowed}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in names}


def check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedStructure(f"{type(config).__name__}: {name}={value!r}; expected one positive integer")


def check_groups(widths: tuple[int, ...], groups: int) -> None:
    for channels in widths:
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into norm_num_groups={groups}")
