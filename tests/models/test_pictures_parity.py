"""Whole pictures against diffusers' pipelines: same weights, same CPU generator seed, DDIM, fp32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from models.config import ScheduleConfig
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from models.text import TextEncoder
from tests.models.small import assemble, diffusers
from tests.models.structures import AUTOENCODERS, UNETS

TOLERANCE = 5e-5
WIDTH, HEIGHT, STEPS = 64, 48, 7  # 7 does not divide 1000
V_PREDICTION = ScheduleConfig(prediction_type="v_prediction")
SETTINGS = [(1.0, 0.0), (5.0, 0.0), (5.0, 1.0), (1.0, 1.0)]

PipelineOf = Callable[[LatentDiffusion, type[Any]], Any]
MakeImage = Callable[[int, int], Image.Image]


def check(model: LatentDiffusion, request: PictureRequest, pipeline: Any, **arguments: Any) -> None:
    """Latents, then pixels before clamping, within TOLERANCE."""
    theirs: Tensor = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        eta=request.eta,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **arguments,
    ).images
    ours = model.render_latents(request)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        decoded = pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(model.decode_latents(ours), decoded, rtol=0, atol=TOLERANCE)


def request_of(task: Any, guidance_scale: float, eta: float, **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {
        "prompt": "a cat",
        "negative_prompt": "dog",
        "width": WIDTH,
        "height": HEIGHT,
        "seed": 11,
        "steps": STEPS,
    }
    return PictureRequest(task=task, guidance_scale=guidance_scale, eta=eta, **(fields | changes))


@pytest.mark.parametrize(("guidance_scale", "eta"), SETTINGS)
def test_txt2img(text_model: LatentDiffusion, pipeline_of: PipelineOf, guidance_scale: float, eta: float) -> None:
    pipeline = pipeline_of(text_model, diffusers.StableDiffusionPipeline)
    check(text_model, request_of("txt2img", guidance_scale, eta), pipeline, width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.5])
@pytest.mark.parametrize(("guidance_scale", "eta"), SETTINGS)
def test_img2img(
    text_model: LatentDiffusion,
    pipeline_of: PipelineOf,
    noise_image: MakeImage,
    guidance_scale: float,
    eta: float,
    strength: float,
) -> None:
    pipeline = pipeline_of(text_model, diffusers.StableDiffusionImg2ImgPipeline)
    image = noise_image(WIDTH, HEIGHT)
    request = request_of("img2img", guidance_scale, eta, image=image, strength=strength)
    check(text_model, request, pipeline, image=image, strength=strength)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("guidance_scale", "eta"), SETTINGS)
@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
def test_inpainting_model(
    inpainter: LatentDiffusion,
    pipeline_of: PipelineOf,
    noise_image: MakeImage,
    hole: Image.Image,
    task: str,
    guidance_scale: float,
    eta: float,
    strength: float,
) -> None:
    """Text alone, or text and a picture, is inpainting of the whole area."""
    pipeline = pipeline_of(inpainter, diffusers.StableDiffusionInpaintPipeline)
    image = noise_image(WIDTH, HEIGHT)
    mask = hole if task == "inpaint" else Image.new("L", image.size, 255)
    if task == "txt2img":
        request, strength = request_of(task, guidance_scale, eta), 1.0
    else:
        given = {"image": image} if task == "img2img" else {"image": image, "mask": mask}
        request = request_of(task, guidance_scale, eta, strength=strength, **given)
    pictures = {"image": image, "mask_image": mask, "width": WIDTH, "height": HEIGHT}
    check(inpainter, request, pipeline, strength=strength, **pictures)


@pytest.mark.parametrize("noise_level", [0, 20])
@pytest.mark.parametrize(("guidance_scale", "eta"), SETTINGS)
def test_upscale(
    upscaler: LatentDiffusion,
    pipeline_of: PipelineOf,
    noise_image: MakeImage,
    guidance_scale: float,
    eta: float,
    noise_level: int,
) -> None:
    pipeline = pipeline_of(upscaler, diffusers.StableDiffusionUpscalePipeline)
    image = noise_image(16, 12)
    request = request_of("upscale", guidance_scale, eta, image=image, noise_level=noise_level)
    check(upscaler, request, pipeline, image=image, noise_level=noise_level)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("guidance_scale", "eta"), SETTINGS)
def test_inpainting_with_a_unet_that_sees_no_mask(
    text_model: LatentDiffusion,
    pipeline_of: PipelineOf,
    noise_image: MakeImage,
    hole: Image.Image,
    guidance_scale: float,
    eta: float,
    strength: float,
) -> None:
    """What is kept is put back after every step."""
    pipeline = pipeline_of(text_model, diffusers.StableDiffusionInpaintPipeline)
    image = noise_image(WIDTH, HEIGHT)
    request = request_of("inpaint", guidance_scale, eta, image=image, mask=hole, strength=strength)
    pictures = {"image": image, "mask_image": hole, "width": WIDTH, "height": HEIGHT}
    check(text_model, request, pipeline, strength=strength, **pictures)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("ddpm", "DDPMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
    ],
)
def test_putting_back_after_the_steps_of_other_samplers(
    text_model: LatentDiffusion,
    folder_of: Callable[[LatentDiffusion], Any],
    noise_image: MakeImage,
    hole: Image.Image,
    sampler: Any,
    kind: str,
    strength: float,
) -> None:
    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder_of(text_model))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, kind).from_config(text_model.schedule.config.to_dict(), clip_sample=False)
    image = noise_image(WIDTH, HEIGHT)
    request = request_of("inpaint", 5.0, 0.0, image=image, mask=hole, strength=strength, sampler=sampler)
    pictures = {"image": image, "mask_image": hole, "width": WIDTH, "height": HEIGHT}
    check(text_model, request, pipeline, strength=strength, **pictures)


@pytest.mark.parametrize(("guidance_scale", "eta"), [(5.0, 0.0), (5.0, 1.0)])
def test_upscaler_whose_self_attention_reads_the_text(
    text_encoder: TextEncoder, pipeline_of: PipelineOf, noise_image: MakeImage, guidance_scale: float, eta: float
) -> None:
    """The structure of SD's x4-upscaler."""
    low_res = ScheduleConfig(beta_start=0.0001, beta_end=0.02)
    model = assemble(text_encoder, AUTOENCODERS["kl_f4_x4"], UNETS["sd_x4"], V_PREDICTION, low_res)
    pipeline = pipeline_of(model, diffusers.StableDiffusionUpscalePipeline)
    image = noise_image(32, 16)
    request = request_of("upscale", guidance_scale, eta, image=image, noise_level=350, width=128, height=64)
    check(model, request, pipeline, image=image, noise_level=350)
