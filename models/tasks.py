"""What each task feeds the UNet: initial latents, concatenated conditioning, timesteps; and what is made of the result.

Noise comes from one CPU generator per picture, in the draw order of the diffusers pipelines, so seeds agree:
txt2img: latents, steps; img2img: posterior, noise, steps; inpainting with a UNet made for it at strength 1: noise,
masked posterior, steps, below 1, and with another UNet: posterior, noise, masked posterior, steps; x4 upscaling:
low-resolution noise, latents, steps; super resolution: latents, steps. Autoencoders with a codebook draw no posterior.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.concatenation import BlankPosterior, blank_mask_and_picture, mask_and_picture, semantic_map, small_mask
from models.layout import LayoutObject
from models.pictures import pad_to_multiple, to_image, to_mask, to_pixels
from models.samplers import Sampler, SamplingPlan, plan, remaining_noise

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

Task = Literal["txt2img", "img2img", "inpaint", "upscale"]


@dataclasses.dataclass(frozen=True)
class PictureRequest:
    """One picture to be made. Sides in pixels; `width` and `height` are the result's (for upscale: f times the image).

    Of `prompt`, `class_label`, `layout` and `semantic_map` a model reads the one that it is conditioned on; the map is
    grey, its values are classes, of the result's size. `image` is RGB; `mask` is grey, of the image's size, white =
    repaint. `strength` in (0, 1] is the share of the steps that img2img and inpaint run; `eta` is DDIM's alone.
    `noise_level` is the timestep to which x4 upscaling noises its input. `loras` are names of the model's adapters with
    weights (1 = as trained). `raw` asks for the decoder's own picture.
    """

    task: Task
    prompt: str
    width: int
    height: int
    seed: int
    steps: int = 20
    guidance_scale: float = 4.0
    negative_prompt: str = ""
    class_label: int | None = None
    layout: tuple[LayoutObject, ...] = ()
    semantic_map: Image.Image | None = None
    sampler: Sampler = "ddim"
    eta: float = 0.0
    strength: float = 1.0
    image: Image.Image | None = None
    mask: Image.Image | None = None
    noise_level: int = 0
    loras: tuple[tuple[str, float], ...] = ()
    raw: bool = False


class Blend(NamedTuple):
    """For a UNet that sees no mask, what `samplers.put_back` takes: clean (scaled latents) and noise [1, z, h, w], mask
    [1, 1, h, w] (1 = repaint), levels [steps, 2]."""

    clean: Tensor
    noise: Tensor
    mask: Tensor
    levels: Tensor


@dataclasses.dataclass
class Start:
    """A picture ready for its first step. The generator stands where the noise of step 0 is drawn.

    latents [1, z, h, w] fp32 (scaled), conditioning [1, c, h, w] fp32 concatenated after them at every step or None;
    `label` is the UNet's class label (the noise level of an upscaler).
    """

    latents: Tensor
    conditioning: Tensor | None
    label: int | None
    plan: SamplingPlan
    generator: torch.Generator
    blend: Blend | None = None

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
    blends = model.blends(request)
    noise_only = full and not blends and (model.inpaints or request.task == "txt2img")
    clean = None if noise_only else model.scaled_sample(model.posterior(_padded(model, request)), generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    latents = sampling.scale * noise if clean is None or (full and blends) else sampling.noised(clean, noise)
    start = Start(latents, None, None, sampling, generator)
    if blends and clean is not None:
        if model.autoencoder.config.codebook_size is None:
            torch.randn(shape, generator=generator)  # diffusers draws the masked picture's latents too, for nothing
        mask = small_mask(model, _mask(model, request))
        start.blend = Blend(clean, noise, mask, remaining_noise(model.schedule, sampling.timesteps))
    elif model.inpaints:
        start.conditioning = _inpaint_conditioning(model, request, generator, blank or model.blank_posterior)
    elif model.semantic is not None:
        start.conditioning = _semantic_conditioning(model, request)
    return start


def _plan(model: LatentDiffusion, request: PictureRequest, strength: float = 1.0) -> SamplingPlan:
    return plan(model.schedule, request.sampler, request.steps, eta=request.eta, strength=strength)


def _need(image: Image.Image | None, message: str) -> Image.Image:
    if image is None:
        raise ValueError(message)
    return image


def _check_size(name: str, image: Image.Image, request: PictureRequest) -> None:
    if image.size != (request.width, request.height):
        raise ValueError(f"{name} is {image.width}x{image.height}, expected {request.width}x{request.height}")


def _padded(model: LatentDiffusion, request: PictureRequest) -> Tensor:
    """The input picture in [-1, 1], padded to a multiple of f."""
    image = _need(request.image, f"{request.task} needs an image")
    _check_size("image", image, request)
    return to_pixels(pad_to_multiple(image.convert("RGB"), model.autoencoder.config.downsampling_factor))


def _mask(model: LatentDiffusion, request: PictureRequest) -> Tensor:
    """[1, 1, H, W], 1 = repaint, padded as the picture."""
    mask = _need(request.mask, "inpaint needs a mask")
    _check_size("mask", mask, request)
    return to_mask(pad_to_multiple(mask.convert("L"), model.autoencoder.config.downsampling_factor))


def _inpaint_conditioning(
    model: LatentDiffusion, request: PictureRequest, generator: torch.Generator, blank: BlankPosterior
) -> Tensor:
    """Without a mask all is repainted."""
    if request.task == "inpaint":
        mask = _mask(model, request)
        return mask_and_picture(model, _padded(model, request), mask, generator)
    f = model.autoencoder.config.downsampling_factor
    height, width = latent_size(model, request)
    return blank_mask_and_picture(model, blank(height * f, width * f), generator)


def _semantic_conditioning(model: LatentDiffusion, request: PictureRequest) -> Tensor:
    classes = _need(request.semantic_map, "this model needs a semantic_map")
    _check_size("semantic_map", classes, request)
    return semantic_map(model, classes)


def _prepare_upscale(
    model: LatentDiffusion, request: PictureRequest, shape: torch.Size, generator: torch.Generator
) -> Start:
    """The small picture, concatenated to latents of the same size; an x4 upscaler's is noised to `noise_level`."""
    image = _need(request.image, "upscale needs an image")
    factor = model.autoencoder.config.downsampling_factor
    width, height = factor * image.width, factor * image.height
    if (request.width, request.height) != (width, height):
        raise ValueError(f"upscale makes {width}x{height} of this image, not {request.width}x{request.height}")
    if not 0 <= request.noise_level <= model.max_noise_level:
        raise ValueError(f"noise_level={request.noise_level}: expected 0 to {model.max_noise_level}")
    low_res, label = to_pixels(image), None
    if model.low_res_schedule is not None:
        noise = torch.randn(low_res.shape, generator=generator, dtype=torch.float32)
        low_res = model.low_res_schedule.add_noise(low_res, noise, torch.tensor([request.noise_level]))
        label = request.noise_level
    sampling = _plan(model, request)
    latents = sampling.scale * torch.randn(shape, generator=generator, dtype=torch.float32)
    return Start(latents, low_res, label, sampling, generator)


@torch.no_grad()
def finish(request: PictureRequest, pixels: Tensor) -> Image.Image:
    """Decoded pixels [1, 3, H, W] -> the picture that our endpoints promise.

    Cropped to the requested size; inpaint gives unmasked pixels back as they came; upscale agrees with its input's
    low frequencies (an autoencoder shifts tints a little). A raw picture is cropped alone.
    """
    if request.raw:
        return to_image(pixels).crop((0, 0, request.width, request.height))
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
