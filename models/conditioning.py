"""What the UNet attends to (tau_theta(y), Rombach et al. 2022, section 3.3): the interface of its encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

Condition = str | int | tuple[int, ...]
"""A prompt, a class label or the tokens of a layout: hashable, so that what was made of it can be kept."""


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

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Into a model folder, as its class's `load` reads it; `dtype` None keeps each tensor's own."""
