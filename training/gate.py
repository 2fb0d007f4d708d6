"""The early gate: does a half-trained model listen to the object word?

With the right captions the loss at a noisy step should be lower than with captions whose object was swapped for
another. A model that sees no difference after 50,000 samples draws backgrounds only, and more steps will not cure it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from models.schedule import NoiseSchedule
from training.data import EMOJI, OBJECTS, SHAPES
from training.data.vocabulary import plural
from training.diffusion import SCHEDULE, Denoiser, new_denoiser
from training.latents import LatentDataset, read_latents

TIMESTEP: Final = 850
"""Noisy enough that the latents alone no longer tell the object, early enough that it is being decided."""

_BATCH: Final = 32
_SEED: Final = 850
_NOUNS: Final = {form: name for name in OBJECTS for form in (name, plural(name))}
_NOUN: Final = re.compile(rf"(?:\b(an?) )?\b({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b")


@dataclasses.dataclass(frozen=True)
class GateResult:
    """Mean squared errors of v over the same pictures, timestep and noise; `error` is the gap's standard error."""

    step: int
    pictures: int
    right: float
    swapped: float
    error: float

    @property
    def gap(self) -> float:
        return self.swapped - self.right

    @property
    def listens(self) -> bool:
        """Whether the gap is clear of chance (three standard errors)."""
        return self.gap > 3 * self.error


def swap_object(caption: str, rng: np.random.Generator) -> str | None:
    """The caption with another object of the same kind and number; None unless it names exactly one kind of object."""
    found = {match.group(2) for match in _NOUN.finditer(caption)}
    if len(found) != 1:
        return None
    (noun,) = found
    name = _NOUNS[noun]
    kind = [other for other in (EMOJI if name in EMOJI else SHAPES) if other != name]
    other = kind[int(rng.integers(len(kind)))]
    word = other if noun == name else plural(other)
    article = "an" if word[0] in "aeiou" else "a"
    return _NOUN.sub(lambda match: f"{article} {word}" if match.group(1) else word, caption)


@torch.no_grad()
def gate(denoiser: Denoiser, data: LatentDataset, pictures: int = 256, step: int = 0) -> GateResult:
    """Over the first `pictures` whose caption names one object, all painted whole; the same call, the same numbers.

    Raises ValueError when there are fewer than two.
    """
    rng = np.random.default_rng(_SEED)
    pairs = [(row, swap_object(caption, rng)) for row, caption in enumerate(data.captions)]
    chosen = [(row, swapped) for row, swapped in pairs if swapped is not None][:pictures]
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} captions name exactly one object; expected at least 2: write more latents")
    rows = [row for row, _ in chosen]
    schedule = NoiseSchedule(SCHEDULE)
    x0 = data.latents[rows].float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(_SEED))
    right = _errors(denoiser, schedule, data, x0, noise, [data.captions[row] for row in rows])
    swapped = _errors(denoiser, schedule, data, x0, noise, [text for _, text in chosen])
    error = float((swapped - right).std()) / math.sqrt(len(rows))
    return GateResult(step, len(rows), float(right.mean()), float(swapped.mean()), error)


def _errors(
    denoiser: Denoiser, schedule: NoiseSchedule, data: LatentDataset, x0: Tensor, noise: Tensor, captions: list[str]
) -> Tensor:
    """[N] squared errors of v at `TIMESTEP`."""
    ids = denoiser.text_encoder.token_ids(captions)
    errors = []
    for rows in torch.split(torch.arange(len(x0)), _BATCH):
        t = torch.full((len(rows),), TIMESTEP)
        conditioning = data.all_masked.expand(len(rows), -1, -1, -1)
        noised = schedule.add_noise(x0[rows], noise[rows], t)
        out = denoiser(torch.cat([noised, conditioning], dim=1), t, ids[rows])
        errors.append((out - schedule.velocity(x0[rows], noise[rows], t)).square().mean(dim=(1, 2, 3)))
    return torch.cat(errors)


def gate_of_runs(runs: Path, pictures: int = 256) -> GateResult:
    """Of the averaged weights last saved in `runs`/diffusion, which may go on training. Raises FileNotFoundError."""
    path = runs / "diffusion" / "state.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: start `darkroom train diffusion`, which saves every two minutes")
    denoiser = new_denoiser(runs / "tokenizer", seed=0).eval()
    state = torch.load(path, weights_only=True)
    denoiser.load_state_dict(state["averaged"])
    return gate(denoiser, read_latents(runs / "latents"), pictures, state["step"])
