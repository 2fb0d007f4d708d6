"""Whole pictures of every sampler and task against diffusers' pipelines: same weights, same CPU seed, fp32.

With the published noise schedules: at the noisy end of a cosine, where the noise is 20,000 times the signal, diffusers'
Euler loses four digits, since it keeps latents divided by the signal.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from models.config import ScheduleConfig
from models.latent_diffusion import LatentDiffusion
from models.samplers import Sampler
from models.tasks import PictureRequest, Task
from models.text import TextEncoder
from tests.models.small import assemble, diffusers
from tests.models.structures import AUTOENCODERS, UNETS

TOLERANCE = 5e-5
WIDTH, HEIGHT = 64, 48
SCHEDULERS: dict[Sampler, tuple[str, dict[str, object]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}

PipelineOf = Callable[[LatentDiffusion, type[Any]], Any]
MakeImage = Callable[[int, int], Image.Image]

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.parametrize("sampler", SCHEDULERS),
]


def check(model: LatentDiffusion, request: PictureRequest, pipeline: Any, **arguments: Any) -> None:
    name, options = SCHEDULERS[request.sampler]
    usual = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(usual.config, **options)
    try:
        theirs = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
            **arguments,
        ).images
    finally:
        pipeline.scheduler = usual
    ours = model.render_latents(request)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def request_of(task: Task, sampler: Sampler, **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "steps": 7, "guidance_scale": 5.0}
    return PictureRequest(task, "a cat", seed=11, negative_prompt="dog", sampler=sampler, **(fields | changes))


def test_txt2img(text_model: LatentDiffusion, pipeline_of: PipelineOf, sampler: Sampler) -> None:
    pipeline = pipeline_of(text_model, diffusers.StableDiffusionPipeline)
    check(text_model, request_of("txt2img", sampler), pipeline, width=WIDTH, height=HEIGHT)


def test_fractional_timesteps(text_encoder: TextEncoder, pipeline_of: PipelineOf, sampler: Sampler) -> None:
    schedule = ScheduleConfig(timestep_spacing="linspace")
    model = assemble(text_encoder, AUTOENCODERS["kl_f8"], UNETS["sd1"], schedule)
    pipeline = pipeline_of(model, diffusers.StableDiffusionPipeline)
    check(model, request_of("txt2img", sampler), pipeline, width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_without_guidance(
    text_encoder: TextEncoder, pipeline_of: PipelineOf, sampler: Sampler, steps: int
) -> None:
    """As SD-Turbo is run: trailing timesteps from 999 on, guidance 0."""
    model = assemble(
        text_encoder, AUTOENCODERS["kl_f8"], UNETS["sd_turbo"], ScheduleConfig(timestep_spacing="trailing")
    )
    pipeline = pipeline_of(model, diffusers.StableDiffusionPipeline)
    request = request_of("txt2img", sampler, steps=steps, guidance_scale=0.0)
    check(model, request, pipeline, width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_img2img(
    text_model: LatentDiffusion, pipeline_of: PipelineOf, noise_image: MakeImage, sampler: Sampler, strength: float
) -> None:
    pipeline, image = pipeline_of(text_model, diffusers.StableDiffusionImg2ImgPipeline), noise_image(WIDTH, HEIGHT)
    request = request_of("img2img", sampler, image=image, strength=strength)
    check(text_model, request, pipeline, image=image, strength=strength)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("structure", ["sd_inpaint", "sd1"])
def test_inpaint(
    text_encoder: TextEncoder,
    pipeline_of: PipelineOf,
    noise_image: MakeImage,
    hole: Image.Image,
    sampler: Sampler,
    structure: str,
    strength: float,
) -> None:
    """With a UNet that sees the mask, and with one that does not, by blending."""
    model = assemble(text_encoder, AUTOENCODERS["kl_f8"], UNETS[structure], ScheduleConfig())
    pipeline, image = pipeline_of(model, diffusers.StableDiffusionInpaintPipeline), noise_image(WIDTH, HEIGHT)
    asked = request_of("inpaint", sampler, image=image, mask=hole, strength=strength)
    pictures = {"image": image, "mask_image": hole, "width": WIDTH, "height": HEIGHT}
    check(model, asked, pipeline, strength=strength, **pictures)


def test_upscale(text_encoder: TextEncoder, pipeline_of: PipelineOf, noise_image: MakeImage, sampler: Sampler) -> None:
    schedule, low_res = ScheduleConfig(prediction_type="v_prediction"), ScheduleConfig(beta_start=1e-4, beta_end=0.02)
    model = assemble(text_encoder, AUTOENCODERS["kl_f4_x4"], UNETS["sd_x4"], schedule, low_res)
    pipeline, image = pipeline_of(model, diffusers.StableDiffusionUpscalePipeline), noise_image(16, 12)
    request = request_of("upscale", sampler, image=image, noise_level=20)
    check(model, request, pipeline, image=image, noise_level=20)
