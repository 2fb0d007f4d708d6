"""Pictures made in this process, by the shipped models with their cards' default settings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contract.card import ModelCard
from contract.spec import Task
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from training.data import Picture
from training.evaluate import UPSCALING, Mask

_UPSCALING_SEED = 7


class Studio:
    """The model for txt2img and inpainting, and the upscaler where its folder is there."""

    def __init__(self, model_dir: Path, upscaler_dir: Path) -> None:
        self._card, self._model = _load(model_dir)
        self._upscaler = _load(upscaler_dir) if (upscaler_dir / "card.json").exists() else None

    @property
    def side(self) -> int:
        """Of the model's own pictures, in pixels."""
        return self._card.default_width

    @property
    def can_upscale(self) -> bool:
        return self._upscaler is not None

    def describe(self) -> Sequence[dict[str, object]]:
        cards = [self._card] + ([self._upscaler[0]] if self._upscaler else [])
        return [
            {"name": card.name, "digest": card.digest, "steps": card.default_steps, "guidance": card.default_guidance}
            for card in cards
        ]

    def txt2img(self, prompt: str, seed: int) -> Picture:
        return _render(self._card, self._model, Task.TXT2IMG, prompt, seed, self.side)

    def inpaint(self, prompt: str, seed: int, picture: Picture, mask: Mask) -> Picture:
        return _render(self._card, self._model, Task.INPAINT, prompt, seed, self.side, picture, mask)

    def upscale(self, picture: Picture, prompt: str) -> Picture:
        if self._upscaler is None:
            raise ValueError("there is no upscaler; name its folder with --upscaler-dir")
        side = picture.shape[0] * UPSCALING
        return _render(*self._upscaler, Task.UPSCALE, prompt, _UPSCALING_SEED, side, picture)


def _load(folder: Path) -> tuple[ModelCard, LatentDiffusion]:
    note = folder / "card.json"
    if not note.exists():
        raise FileNotFoundError(f"{note} is missing: {folder} holds no model; train one with `darkroom train all`")
    return ModelCard.model_validate_json(note.read_text()), LatentDiffusion.load(folder)


@torch.inference_mode()
def _render(
    card: ModelCard,
    model: LatentDiffusion,
    task: Task,
    prompt: str,
    seed: int,
    side: int,
    picture: Picture | None = None,
    mask: Mask | None = None,
) -> Picture:
    request = PictureRequest(
        task=task.value,
        prompt=prompt,
        width=side,
        height=side,
        seed=seed,
        steps=card.default_steps[task],
        guidance_scale=card.default_guidance[task],
        image=None if picture is None else Image.fromarray(picture),
        mask=None if mask is None else Image.fromarray(mask),
        noise_level=card.default_noise_level or 0,
    )
    return np.asarray(model.render(request))
