"""Which files of a model folder hold a part's weights: one file, shards with an index, or those of a variant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from models.weights_io.ckpt import open_pickle
from models.weights_io.tensors import LazyTensor, WeightsError, read_json, read_tensors

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
"""Suffixes of files that are pickles."""


class PickledError(WeightsError):
    """A model that is to be converted first."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How weights are read: `dtype` in memory, None as they are on disk; whether pickled files are read as well."""

    dtype: torch.dtype | None = torch.float32
    pickles: bool = False

    def open(self, path: Path) -> dict[str, LazyTensor]:
        """Raises WeightsError for a file that cannot be read, or must not be."""
        if path.suffix not in PICKLED:
            return read_tensors(path)
        if not self.pickles:
            raise PickledError(f"{path} is a pickle, which is not served: `darkroom models add` converts it once")
        return open_pickle(path)

    def weights(self, folder: Path, stem: str) -> tuple[dict[str, LazyTensor], Path]:
        """The tensors of `folder`, and the file that names them; `stem` is what such files are called."""
        path = self._find(folder, stem)
        if path.suffix != ".json":
            return self.open(path), path
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise WeightsError(f"{path} has no weight_map; expected one from keys to files")
        outside = sorted({name for name in index.values() if Path(name).name != name})
        if outside:
            raise WeightsError(f"{path} names {outside[0]}; expected files of its own folder")
        tensors: dict[str, LazyTensor] = {}
        for name in sorted(set(index.values())):
            tensors |= self.open(folder / name)
        if lost := sorted(index.keys() - tensors.keys()):
            raise WeightsError(f"{path} promises {lost[0]} and {len(lost) - 1} more, which its files do not hold")
        return tensors, path

    def _find(self, folder: Path, stem: str) -> Path:
        """The plain file or its index, else those of a variant (fp16 first), else the same among pickled files."""
        if found := _find(folder, stem, "safetensors"):
            return found
        pickled = _find(folder, {"model": "pytorch_model"}.get(stem, stem), "bin")
        if pickled is None:
            return folder / f"{stem}.safetensors"  # opening it tells that it is missing
        if not self.pickles:
            raise PickledError(
                f"{folder} holds no {stem}.safetensors, only {pickled.name}, a pickle, which is not served: "
                "`darkroom models add` converts such a folder once"
            )
        return pickled


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    for patterns in (
        (f"{stem}.{kind}",),
        (f"{stem}.{kind}.index.json",),
        (f"{stem}.fp16.{kind}",),
        (f"{stem}.{kind}.index.fp16.json", f"{stem}.{kind}.fp16.index.json"),
        (f"{stem}.*.{kind}", f"{stem}.{kind}.index.*.json", f"{stem}.{kind}.*.index.json"),
    ):
        found = {path for pattern in patterns for path in folder.glob(pattern) if "-of-" not in path.name}
        if len(found) > 1:
            names = ", ".join(sorted(path.name for path in found))
            raise WeightsError(f"{folder} has several variants: {names}; expected one, or {stem}.{kind}")
        if found:
            return found.pop()
    return None
