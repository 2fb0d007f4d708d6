"""What tasks promise beyond parity: refusals, strength, odd sizes, untouched pixels, low frequencies, progress."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.latent_diffusion import LatentDiffusion
from models.pictures import to_pixels
from models.samplers import COLUMNS
from models.tasks import PictureRequest, finish, latent_size, prepare

MakeImage = Callable[[int, int], Image.Image]
WHITE = Image.new("L", (64, 48), 255)


def request_of(task: Any, **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 48, "seed": 3, "steps": 2}
    return PictureRequest(task=task, **(fields | changes))


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("inpainter", request_of("upscale"), "serves img2img, inpaint, txt2img, not upscale"),
        ("upscaler", request_of("inpaint"), "serves upscale, not inpaint"),
        ("upscaler", request_of("txt2img"), "serves upscale, not txt2img"),
        ("inpainter", request_of("img2img", strength=0.5), "img2img needs an image"),
        ("text_model", request_of("img2img"), "img2img needs an image"),
        ("inpainter", request_of("inpaint", mask=WHITE), "inpaint needs an image"),
        ("inpainter", request_of("inpaint", image=Image.new("RGB", (64, 48))), "inpaint needs a mask"),
        ("inpainter", request_of("inpaint", image=WHITE, mask=WHITE, width=72), "mask is 64x48, expected 72x48"),
        ("text_model", request_of("img2img", image=WHITE, width=72), "image is 64x48, expected 72x48"),
        ("upscaler", request_of("upscale"), "upscale needs an image"),
        ("upscaler", request_of("upscale", image=WHITE), "makes 256x192 of this image, not 64x48"),
        ("upscaler", request_of("upscale", image=Image.new("L", (16, 12)), noise_level=30), "expected 0 to 29"),
        ("inpainter", request_of("txt2img", steps=0), "expected 1 to 1000"),
        ("text_model", request_of("img2img", image=WHITE, strength=0.0), "strength=0.0"),
        ("text_model", request_of("img2img", image=WHITE, strength=1.5), "strength=1.5"),
    ],
)
def test_refusals(kind: str, request_: PictureRequest, message: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(request.getfixturevalue(kind), request_)


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(10, 1.0, 10), (10, 0.99, 9), (10, 0.5, 5), (7, 0.5, 3), (10, 0.01, 1)]
)
def test_strength_is_the_share_of_the_steps(
    text_model: LatentDiffusion, noise_image: MakeImage, steps: int, strength: float, run: int
) -> None:
    """int(steps * strength) of them, the last ones, as in diffusers; but never none."""
    start = prepare(text_model, request_of("img2img", image=noise_image(64, 48), steps=steps, strength=strength))
    assert list(start.plan.timesteps) == text_model.schedule.timesteps(steps)[steps - run :]
    assert start.plan.coefficients.shape == (run, COLUMNS)


def test_inpainting_models_start_full_strength_from_noise_alone(
    inpainter: LatentDiffusion, noise_image: MakeImage
) -> None:
    expected = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(prepare(inpainter, request_of("txt2img")).latents, expected)
    assert torch.equal(prepare(inpainter, request_of("img2img", image=noise_image(64, 48))).latents, expected)


@pytest.mark.parametrize("size", [(61, 43), (8, 8), (1, 100)], ids=str)
@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
def test_any_size_is_padded_and_cropped(
    inpainter: LatentDiffusion, noise_image: MakeImage, task: str, size: tuple[int, int]
) -> None:
    width, height = size
    given: dict[str, Any] = {} if task == "txt2img" else {"image": noise_image(width, height), "strength": 0.5}
    if task == "inpaint":
        given["mask"] = Image.new("L", size, 255)
    request = request_of(task, width=width, height=height, **given)
    assert latent_size(inpainter, request) == (-(-height // 8), -(-width // 8))
    assert inpainter.render(request).size == size


def test_unmasked_pixels_come_back_identical(
    inpainter: LatentDiffusion, noise_image: MakeImage, hole: Image.Image
) -> None:
    image = noise_image(64, 48)
    request = request_of("inpaint", image=image, mask=hole)
    picture = np.asarray(inpainter.render(request))
    repaint = np.asarray(hole) >= 128
    assert np.array_equal(picture[~repaint], np.asarray(image)[~repaint])
    assert (picture[repaint] != np.asarray(image)[repaint]).mean() > 0.9


def test_upscaling_keeps_the_low_frequencies(upscaler: LatentDiffusion, noise_image: MakeImage) -> None:
    """Whatever was decoded: here from latents of pure noise."""
    small = noise_image(16, 12)
    latents = torch.randn(1, 4, 12, 16)
    picture = finish(request_of("upscale", image=small), upscaler.decode_latents(latents))
    assert picture.size == (64, 48)

    def distance(pixels: torch.Tensor) -> float:
        shrunk = F.interpolate(pixels, size=(12, 16), mode="bicubic", antialias=True)
        return float((shrunk - to_pixels(small)).abs().mean())

    assert distance(to_pixels(picture)) < 0.25 * distance(upscaler.decode_latents(latents).clamp(-1, 1))


def test_progress_is_told_after_each_step(text_model: LatentDiffusion, noise_image: MakeImage) -> None:
    told: list[tuple[int, int]] = []
    request = request_of("img2img", steps=6, strength=0.5, image=noise_image(64, 48))
    text_model.render(request, lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_only_the_low_32_bits_of_a_seed_count(inpainter: LatentDiffusion) -> None:
    """torch's CPU generator reads no more, and what it draws is what diffusers draws: the API says so."""
    starts = [prepare(inpainter, request_of("txt2img", seed=seed)).latents for seed in (3, 3 + 2**32)]
    assert torch.equal(*starts)


def test_the_seed_decides(inpainter: LatentDiffusion) -> None:
    pictures = [np.asarray(inpainter.render(request_of("txt2img", eta=1.0, seed=seed))) for seed in (3, 3, 4)]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
