"""Layouts as context: objects in boxes as a row of tokens, read by the transformer of `models.bert`.

The code is that of LDM's layout-to-image models (Rombach et al. 2022, section 4.3.1), which have it from taming
transformers: three tokens per object (what it is, its box's upper left and its lower right corner), 30 objects, empty
places filled with the last token of the vocabulary, then the two corners of the crop that the picture is of its scene.
A corner is a place on a square grid of as many rows as fit into the vocabulary; its token is row * columns + column.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from models.bert import BertConfig, BertTransformer
from models.conditioning import Condition, Conditioner
from models.config.fields import check_sizes, known_fields
from models.weights_io.configs import read_config
from models.weights_io.files import Reading
from models.weights_io.tensors import write_json

FOLDER = "layout_encoder"
Box = tuple[float, float, float, float]
"""x, y, width, height as shares of the picture's sides; x and y of the upper left corner."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
PUBLISHED = BertConfig(
    vocab_size=8192, max_position_embeddings=92, encoder_layers=16, encoder_ffn_dim=2048, d_model=512
)
"""The transformer of layout2img-openimages256."""


@dataclasses.dataclass(frozen=True)
class LayoutObject:
    """`label` is the object's class. The others are Open Images' remarks on a box: a group of such objects, partly
    hidden, a drawing of one, seen from within."""

    label: int
    box: Box
    group: bool = False
    occluded: bool = False
    depiction: bool = False
    inside: bool = False

    @property
    def modifier(self) -> int:
        return self.group + 2 * self.occluded + 4 * self.depiction + 8 * self.inside


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """`num_classes` (None: unknown, then no remarks on objects can be told) is the number of object classes."""

    num_classes: int | None = None
    max_objects: int = 30
    transformer: BertConfig = PUBLISHED

    def __post_init__(self) -> None:
        check_sizes(self, "max_objects", *([] if self.num_classes is None else ["num_classes"]))
        length = 3 * self.max_objects + 2
        if self.transformer.max_position_embeddings != length:
            got = self.transformer.max_position_embeddings
            raise ValueError(f"max_objects={self.max_objects} make {length} tokens; the transformer reads {got}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        transformer = data.get("transformer", {})
        if not isinstance(transformer, dict):
            raise ValueError(f"transformer={transformer!r}: expected its config")
        return cls(**known_fields(cls, {**data, "transformer": BertConfig.from_dict(transformer)}, {}))

    @property
    def none(self) -> int:
        """The token of an empty place."""
        return self.transformer.vocab_size - 1

    @property
    def sections(self) -> int:
        """Rows, and columns, of the grid of corners."""
        return math.isqrt(self.transformer.vocab_size)

    @property
    def labels(self) -> int:
        """Number of labels that can be told."""
        return self.none if self.num_classes is None else self.num_classes


class LayoutEncoder(Conditioner):
    def __init__(self, config: LayoutConfig, transformer: BertTransformer | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = BertTransformer(config.transformer) if transformer is None else transformer

    @classmethod
    def load(cls, folder: Path, reading: Reading = Reading()) -> LayoutEncoder:  # noqa: B008  # frozen
        """From `folder`/layout_encoder. Raises WeightsError."""
        config = read_config(folder / FOLDER / "config.json", LayoutConfig.from_dict)
        return cls(config, BertTransformer.load(config.transformer, folder / FOLDER, reading))

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        write_json(folder / FOLDER / "config.json", dataclasses.asdict(self.config))
        self.transformer.save(folder / FOLDER, dtype)

    @property
    def width(self) -> int:
        return self.config.transformer.d_model

    @property
    def blank(self) -> tuple[int, ...]:
        return self.tokens(())

    @property
    def learns_unconditional(self) -> bool:
        return False

    def tokens(self, objects: Sequence[LayoutObject]) -> tuple[int, ...]:
        """The layout of a whole scene. Raises ValueError for too many objects, or one that cannot be told."""
        config = self.config
        if len(objects) > config.max_objects:
            raise ValueError(f"layout has {len(objects)} objects; expected at most {config.max_objects}")
        told = [token for one in objects for token in (self._label(one), *self._corners(one.box))]
        empty = [config.none] * (3 * (config.max_objects - len(objects)))
        return (*told, *empty, *self._corners(WHOLE))

    def _label(self, one: LayoutObject) -> int:
        if not 0 <= one.label < self.config.labels:
            raise ValueError(f"layout: label {one.label}; expected 0 to {self.config.labels - 1}")
        token = one.label
        if one.modifier:
            if self.config.num_classes is None:
                raise ValueError("layout: this model's number of classes is unknown, so it can be told labels alone")
            token += self.config.num_classes * one.modifier
        if token >= self.config.none:
            raise ValueError(f"layout: label {one.label} with these remarks is beyond this model's vocabulary")
        return token

    def _corners(self, box: Box) -> tuple[int, int]:
        x, y, width, height = box
        if not (0.0 <= x <= 1.0 and 0.0 <= y <= 1.0 and width > 0.0 and height > 0.0):
            raise ValueError(f"layout: box {list(box)}; expected x, y from 0 to 1 and a width and height above 0")
        return self._corner(x, y), self._corner(min(x + width, 1.0), min(y + height, 1.0))

    def _corner(self, x: float, y: float) -> int:
        last = self.config.sections - 1
        return round(y * last) * self.config.sections + round(x * last)

    def encode(self, condition: Condition) -> Tensor:
        length = self.config.transformer.max_position_embeddings
        if not isinstance(condition, tuple) or len(condition) != length:
            raise ValueError(f"{condition!r} are no {length} tokens of a layout")
        device = self.transformer.embed_tokens.weight.device
        out: Tensor = self.transformer(torch.tensor([condition], device=device))
        return out
