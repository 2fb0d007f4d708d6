"""Class labels as context: one learned token per class (the class-conditional ImageNet models of LDM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.conditioning import Condition, Conditioner
from models.config.fields import check_sizes, known_fields
from models.text import STEM
from models.weights_io.configs import read_config
from models.weights_io.files import Reading
from models.weights_io.tensors import LazyTensor, assign, write_json, write_tensors

FOLDER = "class_encoder"


@dataclasses.dataclass(frozen=True)
class ClassConfig:
    """`unconditional` is the class that stands for none, for which training has dropped labels; None without one."""

    num_classes: int = 1001
    width: int = 512
    unconditional: int | None = 1000

    def __post_init__(self) -> None:
        check_sizes(self, "num_classes", "width")
        if self.unconditional is not None and not 0 <= self.unconditional < self.num_classes:
            raise ValueError(f"unconditional={self.unconditional}: expected 0 to {self.num_classes - 1}")


class ClassEncoder(Conditioner):
    def __init__(self, config: ClassConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_classes, config.width)

    @classmethod
    def of_tensors(
        cls, config: ClassConfig, tensors: Mapping[str, LazyTensor], path: Path, dtype: torch.dtype | None
    ) -> ClassEncoder:
        """With the weights that `path` holds, as `assign` takes them. Raises WeightsError."""
        with torch.device("meta"):
            encoder = cls(config)
        assign(encoder, tensors, path, dtype)
        return encoder

    @classmethod
    def load(cls, folder: Path, reading: Reading = Reading()) -> ClassEncoder:  # noqa: B008  # frozen
        """From `folder`/class_encoder. Raises WeightsError."""
        path = folder / FOLDER / "config.json"
        config = read_config(path, lambda data: ClassConfig(**known_fields(ClassConfig, data, {})))
        return cls.of_tensors(config, *reading.weights(folder / FOLDER, STEM), reading.dtype)

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        write_json(folder / FOLDER / "config.json", dataclasses.asdict(self.config))
        write_tensors(folder / FOLDER / f"{STEM}.safetensors", self.state_dict(), dtype)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def blank(self) -> int:
        return self.config.unconditional or 0

    @property
    def learns_unconditional(self) -> bool:
        return self.config.unconditional is not None

    def encode(self, condition: Condition) -> Tensor:
        if not isinstance(condition, int) or not 0 <= condition < self.config.num_classes:
            raise ValueError(f"class_label={condition!r}: expected 0 to {self.config.num_classes - 1}")
        out: Tensor = self.embedding.weight[condition].view(1, 1, -1)
        return out
