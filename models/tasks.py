"""What each task feeds the UNet: initial latents, concatenated conditioning, timesteps; and what is made of the result.

Noise comes from one CPU generator per picture, in the draw order of the diffusers pipelines, so seeds agree:
txt2img: latents, steps; img2img: posterior, noise, steps; 9-channel inpainting at strength 1: noise, masked posterior,
steps, below 1: posterior, noise, masked posterior, steps; upscale: low-resolution noise, latents, steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.autoencoder import Posterior
from models.pictures import pad_to_multiple, to_image, to_mask, to_pixels
from models.samplers import Sampler, SamplingPlan, plan

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

Task = Literal["txt2img", "img2img", "inpaint", "upscale"]


@dataclasses.dataclass(frozen=True)
class PictureRequest:
    """One picture to be made. Sides in pixels; `width` and `height` are the result's (for upscale: 4x the image).

    `image` is RGB; `mask` is grey, of the image's size, white = repaint. `strength` in (0, 1] is the share of the
    steps that img2img and inpaint run; `eta` is DDIM's alone. `noise_level` is the timestep to which upscale noises its
    input.
    """

    task: Task
    prompt: str
    width: int
    height: int
    seed: int
    steps: int = 20
    guidance_scale: float = 4.0
    negative_prompt: str = ""
    sampler: Sampler = "ddim"
    eta: float = 0.0
    strength: float = 1.0
    image: Image.Image | None = None
    mask: Image.Image | None = None
    noise_level: int = 0

    @property
    def guided(self) -> bool:
        """Classifier-free guidance needs its second UNet row only above scale 1 (as in diffusers' SD pipelines)."""
        return self.guidance_scale > 1.0


@dataclasses.dataclass
class Start:
    """A picture ready for its first step. The generator stands where the noise of step 0 is drawn.

    latents [1, z, h, w] fp32 (scaled), conditioning [1, c, h, w] fp32 concatenated after them at every step or None.
    """

    latents: Tensor
    conditioning: Tensor | None
    label: int | None
    plan: SamplingPlan
    generator: torch.Generator

    def step_noise(self) -> Tensor:
        """Noise of the next step, [1, z, h, w]; nothing is drawn where the sampler takes none."""
        if not self.plan.stochastic:
            return torch.zeros_like(self.latents)
        return torch.randn(self.latents.shape, generator=self.generator, dtype=torch.float32)


def latent_size(model: LatentDiffusion, request: PictureRequest) -> tuple[int, int]:
    """(height, width) of the latents that this picture is denoised at; rows of equal size can share a batch."""
    if request.task == "upscale":
        image = _need(request.image, "upscale needs an image")
        return image.height, image.width
    f = model.autoencoder.config.downsampling_factor
    return -(-request.height // f), -(-request.width // f)


BlankPosterior = Callable[[int, int], Posterior]
"""As `LatentDiffusion.blank_posterior`."""


@torch.no_grad()
def prepare(model: LatentDiffusion, request: PictureRequest, blank: BlankPosterior | None = None) -> Start:
    """Everything up to the first step; runs the VAE encoder at batch 1 where the task has a picture.

    `blank` may give the posterior of a blank picture from a cache.

    Raises ValueError when the model does not serve the task, or when a picture is missing or misshapen.
    """
    if request.task not in model.tasks:
        raise ValueError(f"this model serves {', '.join(sorted(model.tasks))}, not {request.task}")
    generator = torch.Generator().manual_seed(request.seed)
    height, width = latent_size(model, request)
    shape = torch.Size((1, model.autoencoder.config.latent_channels, height, width))
    if request.task == "upscale":
        return _prepare_upscale(model, request, shape, generator)

    sampling = _plan(model, request, 1.0 if request.task == "txt2img" else request.strength)
    full = request.task == "txt2img" or request.strength == 1.0
    noise_only = full and (model.inpaints or request.task == "txt2img")
    clean = None if noise_only else model.scaled_sample(model.posterior(_padded(model, request)), generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    latents = sampling.scale * noise if clean is None else sampling.noised(clean, noise)
    conditioning = None
    if model.inpaints:
        conditioning = _inpaint_conditioning(model, request, generator, blank or model.blank_posterior)
    return Start(latents, conditioning, None, sampling, generator)


def _plan(model: LatentDiffusion, request: PictureRequest, strength: float = 1.0) -> SamplingPlan:
    return plan(model.schedule, request.sampler, request.steps, eta=request.eta, strength=strength)


def _need(image: Image.Image | None, message: str) -> Image.Image:
    if image is None:
        raise ValueError(message)
    return image


def _padded(model: LatentDiffusion, request: PictureRequest) -> Tensor:
    """The input picture in [-1, 1], padded to a multiple of f."""
    image = _need(request.image, f"{request.task} needs an image")
    if image.size != (request.width, request.height):
        raise ValueError(f"image is {image.width}x{image.height}, expected {request.width}x{request.height}")
    return to_pixels(pad_to_multiple(image.convert("RGB"), model.autoencoder.config.downsampling_factor))


def _inpaint_conditioning(
    model: LatentDiffusion, request: PictureRequest, generator: torch.Generator, blank: BlankPosterior
) -> Tensor:
    """[mask 1, masked latents z]: 1 = repaint, the hole is grey (0) (RunwayML's inpainting UNet).

    Without a mask all is repainted: an inpainting model makes pictures from text by repainting everything.
    """
    f = model.autoencoder.config.downsampling_factor
    height, width = latent_size(model, request)
    if request.task == "inpaint":
        mask_image = _need(request.mask, "inpaint needs a mask")
        if mask_image.size != (request.width, request.height):
            raise ValueError(
                f"mask is {mask_image.width}x{mask_image.height}, expected {request.width}x{request.height}"
            )
        mask = to_mask(pad_to_multiple(mask_image.convert("L"), f))
        masked = model.posterior(_padded(model, request) * (mask < 0.5))
        small_mask = F.interpolate(mask, size=(height, width), mode="nearest")
    else:
        masked = blank(height * f, width * f)
        small_mask = torch.ones(1, 1, height, width)
    return torch.cat([small_mask, model.scaled_sample(masked, generator)], dim=1)


def _prepare_upscale(
    model: LatentDiffusion, request: PictureRequest, shape: torch.Size, generator: torch.Generator
) -> Start:
    """Low-resolution picture, noised to `noise_level`, concatenated to latents of the same size."""
    image = _need(request.image, "upscale needs an image")
    if (request.width, request.height) != (4 * image.width, 4 * image.height):
        raise ValueError(
            f"upscale makes {4 * image.width}x{4 * image.height} of this image, not {request.width}x{request.height}"
        )
    if not 0 <= request.noise_level <= model.max_noise_level:
        raise ValueError(f"noise_level={request.noise_level}: expected 0 to {model.max_noise_level}")
    assert model.low_res_schedule is not None  # what made it serve the task
    low_res = to_pixels(image)
    noise = torch.randn(low_res.shape, generator=generator, dtype=torch.float32)
    low_res = model.low_res_schedule.add_noise(low_res, noise, torch.tensor([request.noise_level]))
    sampling = _plan(model, request)
    latents = sampling.scale * torch.randn(shape, generator=generator, dtype=torch.float32)
    return Start(latents, low_res, request.noise_level, sampling, generator)


@torch.no_grad()
def finish(request: PictureRequest, pixels: Tensor) -> Image.Image:
    """Decoded pixels [1, 3, H, W] -> the picture that our endpoints promise.

    Cropped to the requested size; inpaint gives unmasked pixels back as they came; upscale agrees with its input's
    low frequencies (an autoencoder shifts tints a little).
    """
    if request.task == "upscale" and request.image is not None:
        pixels = _match_low_frequencies(pixels, to_pixels(request.image))
    picture = to_image(pixels).crop((0, 0, request.width, request.height))
    if request.task == "inpaint" and request.image is not None and request.mask is not None:
        repaint = request.mask.convert("L").point(lambda value: 255 if value >= 128 else 0)
        picture = Image.composite(picture, request.image.convert("RGB"), repaint)
    return picture


def _match_low_frequencies(pixels: Tensor, low_res: Tensor) -> Tensor:
    """Add the enlarged difference between the input and the shrunk result (a back-projection, Irani & Peleg 1991)."""
    pixels = pixels.float().cpu()
    size = low_res.shape[-2:]
    shrunk = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return pixels + F.interpolate(low_res - shrunk, size=pixels.shape[-2:], mode="bicubic")
