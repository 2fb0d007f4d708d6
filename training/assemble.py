"""Trained parts -> a model folder as `models` and diffusers read it, with its `card.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.autoencoder import Autoencoder
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.weights_io.digest import weights_digest
from models.weights_io.folder import save_folder
from training.data import COLOURS, OBJECTS
from training.diffusion import SCHEDULE, Denoiser
from training.tokenizer import caption_words
from training.upscaler import FACTOR, LOW_RES_SCHEDULE, MAX_NOISE_LEVEL

X4_SCALING_FACTOR = 0.08333
"""The published x4-upscaler's: diffusers sets every StableDiffusionUpscalePipeline to it, whatever the file says."""

VOCABULARY: dict[str, Any] = {
    "objects": list(OBJECTS),
    "colours": list(COLOURS),
    "words": caption_words(),
}


def save_small(denoiser: Denoiser, autoencoder: Autoencoder, weights: Path) -> None:
    """`weights`/darkroom-small: txt2img, img2img and inpaint at 128x128."""
    folder = weights / "darkroom-small"
    save_folder(LatentDiffusion(denoiser.unet, autoencoder, denoiser.text_encoder, NoiseSchedule(SCHEDULE)), folder)
    tasks = ["txt2img", "img2img", "inpaint"]
    card = {
        "name": "darkroom-small",
        "tasks": tasks,
        "description": "Single objects and plain shapes on coloured backgrounds, 128x128. Trained from nothing.",
        "default_width": 128,
        "default_height": 128,
        "max_width": 256,
        "max_height": 256,
        "size_multiple": autoencoder.config.downsampling_factor,
        "latent_downsample": autoencoder.config.downsampling_factor,
        "default_steps": dict.fromkeys(tasks, 25),
        "default_guidance": dict.fromkeys(tasks, 4.0),
        "max_tokens": denoiser.text_encoder.max_tokens,
        "vocabulary": VOCABULARY
        | {"examples": ["a pizza on a blue background", "a red heart on a white background", "two pandas on pink"]},
    }
    write_card(card, folder)


def save_small_x4(denoiser: Denoiser, autoencoder: Autoencoder, weights: Path) -> None:
    """`weights`/darkroom-small-x4: upscale by 4."""
    folder = weights / "darkroom-small-x4"
    autoencoder = with_scaling_factor(autoencoder, X4_SCALING_FACTOR)
    low_res_schedule = NoiseSchedule(LOW_RES_SCHEDULE)
    model = LatentDiffusion(
        denoiser.unet, autoencoder, denoiser.text_encoder, NoiseSchedule(SCHEDULE), low_res_schedule
    )
    save_folder(model, folder)
    card = {
        "name": "darkroom-small-x4",
        "tasks": ["upscale"],
        "description": "Enlarges pictures of the kind that darkroom-small makes by 4.",
        "default_width": 512,
        "default_height": 512,
        "max_width": 1024,
        "max_height": 1024,
        "size_multiple": FACTOR,
        "latent_downsample": autoencoder.config.downsampling_factor,
        "default_steps": {"upscale": 8},
        "default_guidance": {"upscale": 1.0},
        "upscale_factor": FACTOR,
        "default_noise_level": 0,
        "max_noise_level": MAX_NOISE_LEVEL,
        "max_tokens": denoiser.text_encoder.max_tokens,
        "vocabulary": VOCABULARY,
    }
    write_card(card, folder)


@torch.no_grad()
def with_scaling_factor(autoencoder: Autoencoder, scaling_factor: float) -> Autoencoder:
    """The same scaled latents and pictures under another `scaling_factor`; the 1x1 convolutions take it up."""
    ratio = autoencoder.config.scaling_factor / scaling_factor
    rescaled = Autoencoder(dataclasses.replace(autoencoder.config, scaling_factor=scaling_factor))
    rescaled.load_state_dict(autoencoder.state_dict())
    z = autoencoder.config.latent_channels
    into, out_of = rescaled.quant_conv, rescaled.post_quant_conv
    assert isinstance(into, nn.Conv2d)
    assert isinstance(out_of, nn.Conv2d)
    assert into.bias is not None
    into.weight[:z] *= ratio
    into.bias[:z] *= ratio
    into.bias[z:] += 2 * math.log(ratio)
    out_of.weight /= ratio
    return rescaled.eval().requires_grad_(False)


def write_card(card: dict[str, Any], folder: Path) -> None:
    """`card.json` with the digest of all weights; the gateway's ModelCard (contract) reads it."""
    text = json.dumps({**card, "digest": weights_digest(folder)}, indent=2)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")
