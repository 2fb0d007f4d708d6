"""What the configs share: reading known fields, refusing unknown ones, checking dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


class UnsupportedStructure(ValueError):
    """A config asks for something that these modules do not implement."""


def known_fields(
    cls: type[Any], data: Mapping[str, Any], off: Mapping[str, tuple[Any, ...]], *, without: Collection[str] = ()
) -> dict[str, Any]:
    """The dataclass fields (but `without`) in `data`; any other key is private or has a value that `off` allows."""
    names = {field.name for field in dataclasses.fields(cls)}.difference(without)
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


def check_choices(config: object, **choices: Collection[Any]) -> None:
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise UnsupportedStructure(
                f"{type(config).__name__}: {name}={value!r} is not supported; expected {expected}"
            )


def check_groups(widths: Collection[int], groups: int, name: str = "norm_num_groups") -> None:
    for channels in widths:
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {name}={groups}")


def sides(sample_size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a `sample_size`, which may be one number for both."""
    if isinstance(sample_size, int):
        return (sample_size, sample_size)
    height, width = sample_size
    return (height, width)
