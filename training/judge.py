"""The judge: a small residual network (He et al. 2015) that says what a picture shows, or that it shows nothing known.

It is trained on real renders and on spoilt ones (`judge_examples`), and frozen before any generator is scored with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from training.data.vocabulary import COLOURS, OBJECTS, SHAPES

REJECT: Final = "reject"
OBJECT_CLASSES: Final = (*OBJECTS, REJECT)
COLOUR_CLASSES: Final = (*COLOURS, REJECT)
INPUT_SIDE: Final = 64
_WIDTHS: Final = (32, 64, 112)
JUDGE_FOLDER: Final = Path(__file__).parent.parent / "weights" / "judge"


@dataclass(frozen=True)
class Verdict:
    """What the judge sees. "reject" stands for mush, blanks, wrong colours and anything it does not know."""

    object: str
    colour: str | None  # of a shape; None for emoji and rejected objects
    background: str


class Judge(nn.Module):
    """Pictures [n, 3, 64, 64] in [-1, 1] to logits of three heads: object, shape colour, background colour."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = _WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first))
        self.body = nn.Sequential(
            _Residual(first, first, 1),
            _Residual(first, second, 2),
            _Residual(second, second, 1),
            _Residual(second, third, 2),
            _Residual(third, third, 1),
        )
        # Max keeps a small object from drowning in its background; mean sees the background.
        self.object_head = nn.Linear(2 * third, len(OBJECT_CLASSES))
        self.colour_head = nn.Linear(2 * third, len(COLOUR_CLASSES))
        self.background_head = nn.Linear(2 * third, len(COLOUR_CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(F.relu(self.stem(x)))
        x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return self.object_head(x), self.colour_head(x), self.background_head(x)

    @torch.no_grad()
    def judge(self, pictures: npt.NDArray[np.uint8], batch: int = 64) -> list[Verdict]:
        """Verdicts on pictures [n, side, side, 3]; side is a multiple of 64, 128 is what it was trained for."""
        verdicts = []
        for start in range(0, len(pictures), batch):
            logits = self(to_input(pictures[start : start + batch]))
            verdicts += [_verdict(*row) for row in zip(*(head.argmax(1).tolist() for head in logits), strict=True)]
        return verdicts


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + self.shortcut(x))


def to_input(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [n, side, side, 3] to [n, 3, 64, 64] in [-1, 1], averaged over areas."""
    side = pictures.shape[1]
    if pictures.ndim != 4 or pictures.shape[1:] != (side, side, 3) or side % INPUT_SIDE:
        raise ValueError(f"pictures have shape {pictures.shape}; expected [n, side, side, 3], side a multiple of 64")
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.avg_pool2d(x, side // INPUT_SIDE)


def load_judge(folder: str | Path = JUDGE_FOLDER) -> Judge:
    """The frozen judge, in fp32. Raises ValueError if it was trained on another vocabulary than today's."""
    folder = Path(folder)
    notes = json.loads((folder / "judge.json").read_text())
    if tuple(notes["object_classes"]) != OBJECT_CLASSES or tuple(notes["colour_classes"]) != COLOUR_CLASSES:
        raise ValueError(
            f"the judge in {folder} knows other classes than training/data/vocabulary.py; "
            "train it anew: python -m training.judge_training"
        )
    judge = Judge()
    judge.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in load_file(folder / "judge.safetensors").items()}
    )
    return judge.eval().requires_grad_(False)


def _verdict(object_class: int, colour_class: int, background_class: int) -> Verdict:
    name = OBJECT_CLASSES[object_class]
    return Verdict(name, COLOUR_CLASSES[colour_class] if name in SHAPES else None, COLOUR_CLASSES[background_class])
