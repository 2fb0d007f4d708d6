"""Reading and writing one part of a model: a JSON config and its tensors. Everything is checked before use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_LISTED = 20
_RELEASE_BYTES = 256 * 2**20


class WeightsError(ValueError):
    """A folder or file that does not hold the model it should; the message lists what is wrong with it."""


class LazyTensor(NamedTuple):
    """A tensor on disk: its shape is known, its values come with `read`."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def changed(self, shape: Sequence[int], change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """What `change` makes of it when it is read: a tensor of `shape`."""
        return LazyTensor(tuple(shape), lambda: change(self.read()))


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; a diffusers model folder has it") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


class _MappedFile:
    """A safetensors file, mapped into memory. Pages once read count as memory for as long as the mapping lives, so it
    is mapped anew now and then: where tensors are converted as they are read, no second copy of all builds up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._file = self._open()
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except OSError as error:
            raise WeightsError(f"{self._path} cannot be read: {error}") from error
        except SafetensorError as error:
            raise WeightsError(f"{self._path} is no whole safetensors file: {error}") from error

    def read(self, key: str) -> Tensor:
        if self._read > _RELEASE_BYTES:
            self._file, self._read = self._open(), 0
        tensor: Tensor = self._file.get_tensor(key)
        self._read += tensor.nbytes
        return tensor


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """The file's tensors by key; raises WeightsError for a missing, truncated or other file."""
    file = _MappedFile(path)

    def lazy(key: str) -> LazyTensor:
        return LazyTensor(file.shapes[key], lambda: file.read(key))

    return {key: lazy(key) for key in file.shapes}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """In `dtype`; None keeps each tensor's own. The file appears whole: a process that has mapped what was there
    before keeps reading that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    converted = {key: tensor.detach().to(dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()}
    save_file(converted, partial, {"format": "pt"})
    os.replace(partial, path)


def check_keys(expected: Mapping[str, Sequence[int]], found: Mapping[str, LazyTensor], path: Path) -> None:
    """Raises WeightsError with the missing, unexpected and misshapen keys of `path`."""
    problems = [f"missing {key}" for key in expected.keys() - found.keys()]
    problems += [f"unexpected {key}" for key in found.keys() - expected.keys()]
    problems += [
        f"{key} is {list(found[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key].shape != tuple(shape)
    ]
    if problems:
        listed = sorted(problems)[:_LISTED]
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise WeightsError(f"{path} does not fit the structure of its model: {'; '.join(listed)}{more}")


def assign(part: nn.Module, tensors: Mapping[str, LazyTensor], path: Path, dtype: torch.dtype | None) -> None:
    """Make `tensors`, read from `path` one by one, the parameters of `part`; None keeps their types.

    A tensor that has the type already stays in the mapped file and is read when it is first used. Raises WeightsError
    as `check_keys` does, before anything is read, and for integers, which quantised weights may be.
    """
    check_keys({key: tensor.shape for key, tensor in part.state_dict().items()}, tensors, path)
    for key, tensor in tensors.items():
        value = tensor.read()
        if not value.is_floating_point():
            raise WeightsError(f"{path}: {key} is of type {value.dtype}; expected floating-point numbers")
        owner, _, name = key.rpartition(".")  # not all of `part`, which would be searched for every key
        part.get_submodule(owner).load_state_dict({name: value.to(dtype or value.dtype)}, strict=False, assign=True)
