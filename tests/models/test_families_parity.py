"""LDM's own kinds of models against diffusers: its pipelines where it has one, else compositions of its modules."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.bert import BertEncoder
from models.class_label import ClassEncoder
from models.latent_diffusion import LatentDiffusion
from models.layout import LayoutEncoder, LayoutObject
from models.pictures import to_mask, to_pixels
from models.tasks import PictureRequest, prepare
from tests.models.families import (
    CLASSES,
    SEMANTIC_CLASSES,
    family,
    sample,
    their_bert,
    their_scheduler,
)
from tests.models.small import diffusers
from tests.models.small import theirs as peer

TOLERANCE = 5e-5
STEPS = 4
OBJECTS = (LayoutObject(1, (0.1, 0.2, 0.5, 0.6)), LayoutObject(3, (0.4, 0.0, 0.6, 0.3), occluded=True))
MakeImage = Callable[[int, int], Image.Image]
cached = functools.cache(family)


def request_of(task: Any = "txt2img", **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"prompt": "", "width": 64, "height": 32, "seed": 11, "steps": STEPS}
    return PictureRequest(task=task, **(fields | changes))


def check_decoded(model: LatentDiffusion, request: PictureRequest, theirs: Any) -> None:
    """Pictures in [0, 1], channels last, as the pipelines give them."""
    pixels = model.decode_latents(model.render_latents(request))
    ours = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=TOLERANCE)


def check_latents(model: LatentDiffusion, request: PictureRequest, theirs: Tensor) -> None:
    """And the picture, 0 to 1, before it is clamped."""
    ours = model.render_latents(request)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        decoded = peer(model.autoencoder).decode(theirs / model.autoencoder.config.scaling_factor).sample
    torch.testing.assert_close(model.decode_latents(ours) / 2, decoded / 2, rtol=0, atol=TOLERANCE)


def global_generator() -> torch.Generator:
    """Both of LDM's pipelines draw the noise of their steps from it, whatever generator they are given."""
    torch.manual_seed(11)
    return torch.default_generator


@pytest.mark.parametrize(("scale", "eta"), [(1.0, 0.0), (5.0, 0.0), (5.0, 1.0)])
def test_text2im(scale: float, eta: float) -> None:
    model = cached("text2im")
    encoder = model.conditioner
    assert isinstance(encoder, BertEncoder)
    pipeline = diffusers.LDMTextToImagePipeline(
        vqvae=peer(model.autoencoder),
        bert=their_bert(encoder.transformer),
        tokenizer=encoder.tokenizer,
        unet=peer(model.unet),
        scheduler=their_scheduler(model),
    )
    pipeline.set_progress_bar_config(disable=True)
    request = request_of(prompt="A cat, catdog!", width=128, height=64, guidance_scale=scale, eta=eta)
    theirs = pipeline(
        request.prompt,
        height=64,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        eta=eta,
        generator=global_generator(),
        output_type="np",
    ).images
    check_decoded(model, request, theirs)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["celeba", "churches"])
def test_unconditional(name: str, eta: float) -> None:
    """Guidance has nothing to guide by."""
    model = cached(name)
    pipeline = diffusers.LDMPipeline(
        vqvae=peer(model.autoencoder), unet=peer(model.unet), scheduler=their_scheduler(model)
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(generator=global_generator(), eta=eta, num_inference_steps=STEPS, output_type="np").images
    side = theirs.shape[1]
    check_decoded(model, request_of(width=side, height=side, eta=eta, guidance_scale=7.0), theirs)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_super_resolution(noise_image: MakeImage, eta: float) -> None:
    model, small = cached("super_resolution"), noise_image(64, 32)
    pipeline = diffusers.LDMSuperResolutionPipeline(
        vqvae=peer(model.autoencoder), unet=peer(model.unet), scheduler=their_scheduler(model)
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(small, num_inference_steps=STEPS, eta=eta, generator=global_generator(), output_type="np").images
    check_decoded(model, request_of("upscale", width=256, height=128, image=small, eta=eta), theirs)


@pytest.mark.parametrize(("scale", "eta"), [(1.0, 0.0), (3.0, 0.0), (3.0, 1.0)])
@pytest.mark.parametrize("name", ["class", "class_f8"])
def test_class_conditional(name: str, scale: float, eta: float) -> None:
    """The unconditional row attends to the class that stands for none."""
    model = cached(name)
    assert isinstance(model.conditioner, ClassEncoder)
    table = model.conditioner.embedding.weight
    labels = [CLASSES, 2] if scale > 1 else [2]
    f = model.autoencoder.config.downsampling_factor
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, model.unet.config.out_channels, 64 // f, 128 // f, generator=generator)
    theirs = sample(model, generator, latents, steps=STEPS, eta=eta, contexts=table[labels][:, None], scale=scale)
    request = request_of(class_label=2, width=128, height=64, guidance_scale=scale, eta=eta)
    check_latents(model, request, theirs)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_layout(eta: float) -> None:
    model = cached("layout")
    encoder = model.conditioner
    assert isinstance(encoder, LayoutEncoder)
    with torch.no_grad():
        context = their_bert(encoder.transformer)(torch.tensor([encoder.tokens(OBJECTS)]))[0]
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 3, 8, 16, generator=generator)
    theirs = sample(model, generator, latents, steps=STEPS, eta=eta, contexts=context)
    check_latents(model, request_of(layout=OBJECTS, eta=eta), theirs)


def semantic_map(width: int, height: int) -> Image.Image:
    labels = np.random.default_rng(3).integers(0, SEMANTIC_CLASSES, (height // 4, width // 4), dtype=np.uint8)
    return Image.fromarray(labels, "L").resize((width, height), Image.Resampling.NEAREST, box=(1, 1, 14, 7))


def one_hot_beside(model: LatentDiffusion, image: Image.Image) -> Tensor:
    """As LDM's SpatialRescaler computes it."""
    labels = torch.from_numpy(np.array(image, dtype=np.int64))
    maps = F.one_hot(labels, SEMANTIC_CLASSES).permute(2, 0, 1)[None].float()
    for _ in range(2):
        maps = F.interpolate(maps, scale_factor=0.5, mode="bilinear")
    assert model.semantic is not None
    return model.semantic(maps)  # type: ignore[no-any-return]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_semantic(eta: float) -> None:
    model, image = cached("semantic"), semantic_map(64, 32)
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 3, 8, 16, generator=generator)
    beside = one_hot_beside(model, image)
    assert beside.std() > 0.1
    theirs = sample(model, generator, latents, steps=STEPS, eta=eta, beside=beside)
    check_latents(model, request_of(semantic_map=image, eta=eta), theirs)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_inpainting_big(noise_image: MakeImage, eta: float) -> None:
    """Black holes, a mask of -1 and 1 last, latents before quantising; nothing is drawn for them."""
    model, image = cached("inpainting_big"), noise_image(64, 32)
    hole = Image.new("L", (64, 32), 127)
    hole.paste(128, (13, 5, 50, 30))
    mask, pixels = to_mask(hole), to_pixels(image)
    masked = (1 - mask) * (pixels + 1) / 2  # in [0, 1], as the original script has it
    with torch.no_grad():
        latents_of_masked = peer(model.autoencoder).encode(masked * 2 - 1).latents
    small = F.interpolate(mask * 2 - 1, size=(8, 16))
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 3, 8, 16, generator=generator)
    beside = torch.cat([latents_of_masked, small], dim=1)
    theirs = sample(model, generator, latents, steps=STEPS, eta=eta, beside=beside)
    request = request_of("inpaint", image=image, mask=hole, eta=eta)
    check_latents(model, request, theirs)
    picture = np.asarray(model.render(request))
    keep = np.asarray(hole) < 128
    assert np.array_equal(picture[keep], np.asarray(image)[keep])


def test_pictures_far_beyond_the_trained_size() -> None:
    """512 x 1024, of a UNet trained on latents of 8 x 8 (Rombach et al. 2022, section 4.3.2)."""
    model, image = cached("semantic"), semantic_map(1024, 512)
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 3, 128, 256, generator=generator)
    theirs = sample(model, generator, latents, steps=1, eta=0.0, beside=one_hot_beside(model, image))
    ours = model.render_latents(request_of(semantic_map=image, width=1024, height=512, steps=1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "conditioning", "tasks"),
    [
        ("text2im", "text", {"txt2img", "img2img", "inpaint"}),
        ("class", "class", {"txt2img", "img2img", "inpaint"}),
        ("layout", "layout", {"txt2img", "img2img", "inpaint"}),
        ("semantic", "semantic", {"txt2img"}),
        ("inpainting_big", "none", {"inpaint"}),
        ("super_resolution", "none", {"upscale"}),
        ("celeba", "none", {"txt2img", "img2img", "inpaint"}),
    ],
)
def test_what_a_model_does_and_takes(name: str, conditioning: str, tasks: set[str]) -> None:
    model = cached(name)
    assert model.conditioning == conditioning
    assert model.tasks == tasks


@pytest.mark.parametrize("name", ["celeba", "class", "layout"])
def test_pictures_begun_from_pictures(noise_image: MakeImage, name: str) -> None:
    """img2img keeps more of the picture the less of the schedule it runs; inpainting keeps what is not masked."""
    model, image = cached(name), noise_image(64, 64)
    given: dict[str, Any] = {"width": 64, "height": 64, "image": image, "class_label": 1, "layout": OBJECTS}
    clean = model.posterior(to_pixels(image)).mean

    def distance(strength: float) -> float:
        request = request_of("img2img", **given, strength=strength, steps=20)
        return float((model.render_latents(request) - clean).abs().mean())

    assert distance(0.05) < distance(0.5) < distance(1.0)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    latents = model.render_latents(request_of("inpaint", **given, mask=mask))
    torch.testing.assert_close(latents[..., 8:], clean[..., 8:], rtol=0, atol=0)
    assert (latents[..., :8] - clean[..., :8]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("class", request_of(), "class_label=None: expected 0 to 5"),
        ("class", request_of(class_label=6), "class_label=6: expected 0 to 5"),
        ("layout", request_of(layout=(LayoutObject(4, (0, 0, 1, 1)),)), "label 4; expected 0 to 3"),
        ("semantic", request_of(), "needs a semantic_map"),
        ("semantic", request_of(semantic_map=Image.new("L", (64, 64))), "semantic_map is 64x64, expected 64x32"),
        ("semantic", request_of(semantic_map=Image.new("L", (64, 32), 7)), "has class 7; expected 0 to 6"),
        ("super_resolution", request_of("upscale", image=Image.new("RGB", (16, 8)), noise_level=1), "expected 0 to 0"),
        ("super_resolution", request_of("upscale", image=Image.new("RGB", (8, 8))), "makes 32x32 of this image"),
    ],
)
def test_refusals(name: str, request_: PictureRequest, message: str) -> None:
    model = cached(name)
    with pytest.raises(ValueError, match=message):
        (prepare if name in ("semantic", "super_resolution") else LatentDiffusion.conditions)(model, request_)
