"""What the configs share: reading known fields, refusing unknown ones, checking dimensions."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

LARGEST: Final = 2**20
"""No size of a published model comes near; a much larger one would never be built, or overflow."""
MOST_LAYERS: Final = 256


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
    hints = get_type_hints(cls)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in names}
    for key, value in values.items():
        if not _is_a(value, hints[key]):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise UnsupportedStructure(f"{cls.__name__}: {key}={data[key]!r}; expected {expected}")
    return values


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value from JSON, its lists made tuples, is what a field's annotation says."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and len(value) > 0 and all(_is_a(one, inner[0]) for one in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def strings(data: Mapping[str, Any], name: str) -> list[str]:
    """Raises UnsupportedStructure for what is no list of strings."""
    value = data[name]
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise UnsupportedStructure(f"{name}={value!r}; expected a list of strings")
    return list(value)


def check_sizes(config: object, *names: str, most: int = LARGEST) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise UnsupportedStructure(
                f"{type(config).__name__}: {name}={value!r}; expected one integer from 1 to {most}"
            )


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
        if not 1 <= channels <= LARGEST:
            raise ValueError(f"block_out_channels of {channels}; expected 1 to {LARGEST}")
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {name}={groups}")


def sides(sample_size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a `sample_size`, which may be one number for both. Raises ValueError for what cannot be."""
    both = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if len(both) != 2 or not all(1 <= side <= LARGEST for side in both):
        raise ValueError(f"sample_size={sample_size}; expected one side, or height and width, from 1 to {LARGEST}")
    return both[0], both[1]
