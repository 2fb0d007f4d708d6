"""What the UNet attends to (tau_theta(y), Rombach et al. 2022, section 3.3): the interface of its encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

Condition = str | int | tuple[int, ...]
"""A prompt, a class label or the tokens of a layout: hashable, so that what was made of it can be kept."""


class Encoded(NamedTuple):
    """Of k conditions: context [k, L, D], pooled [k, D'] or None."""

    context: Tensor
    pooled: Tensor | None

    @classmethod
    def join(cls, rows: Sequence[Encoded]) -> Encoded:
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return cls(torch.cat([row.context for row in rows]), torch.cat(pooled) if pooled else None)


class Conditioner(nn.Module, ABC):
    @property
    @abstractmethod
    def width(self) -> int:
        """D of the context."""

    @property
    @abstractmethod
    def blank(self) -> Condition:
        """One that says nothing; where the model learned it, the unconditional one of classifier-free guidance."""

    @property
    @abstractmethod
    def learns_unconditional(self) -> bool:
        """Whether training has dropped conditions for `blank`, so that guidance is possible."""

    @abstractmethod
    def encode(self, condition: Condition) -> Tensor:
        """-> context [1, L, D] on the encoder's device. Raises ValueError for a condition of another kind."""

    @property
    def pooled_width(self) -> int:
        """Width of what `encode_with_pooled` gives beside the context; 0 for nothing."""
        return 0

    def encode_with_pooled(self, condition: Condition) -> Encoded:
        """`encode` and, for a UNet that embeds it beside the timestep, the condition as one vector."""
        return Encoded(self.encode(condition), None)

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Into a model folder, as its class's `load` reads it; `dtype` None keeps each tensor's own."""
