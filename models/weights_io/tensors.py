"""Reading and writing one part of a model: a JSON config and a safetensors file. Everything is checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class WeightsError(ValueError):
    """A folder or file that does not hold the model it should; the message lists what is wrong with it."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; a diffusers model folder has it") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors as fp32; raises WeightsError for a missing, truncated or other file."""
    try:
        tensors = load_file(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from error
    return {key: tensor.float() for key, tensor in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().to(dtype).contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})


def assign(part: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Make `tensors`, read from `path`, the parameters of `part`, without a copy.

    Raises WeightsError with every missing, unexpected and misshapen key.
    """
    expected = {key: tensor.shape for key, tensor in part.state_dict().items()}
    problems = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        raise WeightsError(f"{path} does not fit its config.json: " + "; ".join(sorted(problems)))
    part.load_state_dict(dict(tensors), assign=True)
