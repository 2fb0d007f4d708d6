"""Reading a part's JSON config: what is wrong with one names its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from models.config import UnsupportedStructure
from models.weights_io.tensors import WeightsError, read_json

T = TypeVar("T")


def read_config(path: Path, understand: Callable[[Mapping[str, Any]], T]) -> T:
    """Raises WeightsError for a file that is no config or contradicts itself, UnsupportedStructure as `understand`."""
    return understood(path, lambda: understand(read_json(path)))


def understood(path: Path, make: Callable[[], T]) -> T:
    """What `make` makes of `path`; its ValueErrors become those of `read_config`."""
    try:
        return make()
    except WeightsError:
        raise
    except UnsupportedStructure as error:
        raise UnsupportedStructure(f"{path}: {error}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
