"""A model's parts from wherever it lies."""

from __future__ import annotations

from pathlib import Path

from models.weights_io.files import Reading
from models.weights_io.folder import Parts, load_folder
from models.weights_io.single_file import Told, load_single_file


def load_parts(path: Path, reading: Reading = Reading(), told: Told = Told()) -> Parts:  # noqa: B008  # frozen
    """Of a diffusers folder or a single file in the original layout, on the CPU.

    Raises WeightsError for what is no model, a missing or broken file, missing, unexpected or misshapen keys;
    UnsupportedStructure for a structure that `models` does not implement.
    """
    return load_single_file(path, reading, told) if path.is_file() else load_folder(path, reading)
