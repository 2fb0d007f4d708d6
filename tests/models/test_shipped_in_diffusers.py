"""The shipped models open in diffusers and give the same picture there for the same seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from tests.models.small import diffusers

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
PROMPT = "a pizza on a blue background"


def in_half_range(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], as diffusers gives pictures."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def test_darkroom_small_makes_the_same_picture() -> None:
    folder = WEIGHTS / "darkroom-small"
    model = LatentDiffusion.load(folder)
    request = PictureRequest("txt2img", PROMPT, 128, 128, seed=7, steps=4, guidance_scale=4.0)
    ours = in_half_range(model.decode_latents(model.render_latents(request)))
    pipeline: Any = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPT,
        image=Image.new("RGB", (128, 128), (128, 128, 128)),
        mask_image=Image.new("L", (128, 128), 255),
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=4.0,
        strength=1.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    assert (ours - theirs).abs().max() < 5e-4


# Printed at every load; see training/assemble.py, X4_SCALING_FACTOR.
@pytest.mark.filterwarnings("ignore:The configuration file of the vae:FutureWarning")
def test_darkroom_small_x4_makes_the_same_picture() -> None:
    folder = WEIGHTS / "darkroom-small-x4"
    model = LatentDiffusion.load(folder)
    image = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    request = PictureRequest("upscale", PROMPT, 128, 128, seed=7, steps=4, guidance_scale=1.0, image=image)
    ours = in_half_range(model.decode_latents(model.render_latents(request)))
    pipeline: Any = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPT,
        image=image,
        num_inference_steps=4,
        guidance_scale=1.0,
        noise_level=0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    assert (ours - theirs).abs().max() == pytest.approx(0, abs=5e-4)
