"""A tuned model is the plain one within rounding, whatever it is tuned to."""

import copy
import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image

from models.latent_diffusion import LatentDiffusion
from models.pictures import to_pixels
from models.tasks import PictureRequest
from tests.tiny_models import BASE, UPSCALER
from worker.engine.resident import ResidentModel
from worker.engine.tuned_layers import PackedConv, TunedGroupNorm, can_pack, even_silu_
from worker.engine.tuning import Tuning, candidates, default_tuning, tune

Models = Mapping[str, LatentDiffusion]
CPU = torch.device("cpu")
FP32 = candidates(CPU, "float32")
BF16 = candidates(CPU, "bfloat16")
SIZES = [(8, 8), (5, 7)]
"""The tiny models' own, for which weights are packed, and one that is odd at every level."""


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()


def inputs(model: LatentDiffusion, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """x, t, context of 2 x 3 rows, labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, model.unet.config.in_channels, *size, generator=generator)
    context = torch.randn(6, 11, model.unet.config.context_width, generator=generator)
    return x, torch.tensor([1, 400, 999]), context, torch.tensor([0, 20, 349])


def outputs(model: LatentDiffusion, size: tuple[int, int], rows: int = 3) -> torch.Tensor:
    x, t, context, labels = inputs(model, size)
    emb = model.unet.embed(t[:rows], None if model.unet.class_embedding is None else labels[:rows])
    context = torch.cat([context[:rows], context[3 : 3 + rows]])
    with torch.inference_mode():
        return model.unet.denoise(x[:rows].to(emb.dtype), emb, model.unet.project_context(context.to(emb.dtype)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tuning", FP32, ids=str)
@pytest.mark.parametrize("name", [BASE, UPSCALER])
def test_fp32_is_equal_within_1e_5(models: Models, name: str, tuning: Tuning, size: tuple[int, int]) -> None:
    tuned = tune(models[name], tuning)
    for rows in (1, 3):
        assert largest(outputs(tuned, size, rows), outputs(models[name], size, rows)) < 1e-5
    latents = inputs(models[name], size)[0][:1, :4]
    assert largest(tuned.decode_latents(latents), models[name].decode_latents(latents)) < 1e-5
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    found, expected = tuned.posterior(pixels), models[name].posterior(pixels)
    assert largest(found.mean, expected.mean) < 1e-5
    assert largest(found.logvar, expected.logvar) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tuning", BF16, ids=str)
@pytest.mark.parametrize("name", [BASE, UPSCALER])
def test_bf16_is_near(models: Models, name: str, tuning: Tuning, size: tuple[int, int]) -> None:
    """8 bits of mantissa through some 60 layers: within a few percent of the outputs, which are of the order of 1."""
    tuned = tune(models[name], tuning)
    expected = outputs(models[name], size)
    found = outputs(tuned, size)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05
    latents = inputs(models[name], size)[0][:1, :4]
    pixels, plain = tuned.decode_latents(latents), models[name].decode_latents(latents)
    assert (pixels.float() - plain).norm() / plain.norm() < 0.05


def test_an_autoencoder_that_may_leave_the_range_of_fp16_stays_in_fp32(models: Models) -> None:
    model = copy.copy(models[BASE])
    assert model.autoencoder.config.force_upcast
    for narrow, dtype in ((False, torch.float32), (True, torch.float16)):
        config = dataclasses.replace(model.autoencoder.config, force_upcast=not narrow)
        autoencoder = copy.copy(models[BASE].autoencoder)
        autoencoder.config = config
        model._modules = {**models[BASE]._modules, "autoencoder": autoencoder}
        tuned = tune(model, Tuning("float16"))
        assert tuned.unet.conv_in.weight.dtype == torch.float16
        assert tuned.autoencoder.encoder.conv_in.weight.dtype == dtype
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        pixels, plain = tuned.decode_latents(latents), models[BASE].decode_latents(latents)
        assert largest(pixels, plain) < (0.02 if narrow else 1e-5) * plain.abs().max()


def test_the_original_stays_as_it_was(models: Models) -> None:
    before = outputs(models[BASE], (8, 8))
    tune(models[BASE], Tuning("bfloat16"))
    assert torch.equal(outputs(models[BASE], (8, 8)), before)


def test_time_projections_are_made_once_per_timestep(models: Models) -> None:
    """With class labels, which go in before a non-linearity, the table stays that of the embedding."""
    widths = {name: ResidentModel(tune(models[name], default_tuning(CPU))).time_table.shape for name in models}
    projected = sum(
        layer.out_features for name, layer in models[BASE].unet.named_modules() if name.endswith("time_emb_proj")
    )
    assert widths == {BASE: (1000, projected), UPSCALER: (1000, models[UPSCALER].unet.config.time_embed_dim)}
    assert ResidentModel(tune(models[BASE], Tuning())).parameters > 0


def test_pictures_are_the_plain_ones(models: Models) -> None:
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=4, guidance_scale=3.0)
    plain, tuned = (np.asarray(one.render(request), dtype=int) for one in (models[BASE], tune(models[BASE], FP32[0])))
    assert np.abs(plain - tuned).max() <= 1
    small = Image.new("RGB", (8, 8), (90, 10, 200))
    upscale = PictureRequest("upscale", "", 32, 32, seed=1, steps=3, guidance_scale=1.0, image=small, noise_level=20)
    plain, tuned = (np.asarray(one.render(upscale), int) for one in (models[UPSCALER], tune(models[UPSCALER], FP32[0])))
    assert np.abs(plain - tuned).max() <= 1


@pytest.mark.parametrize("tuning", [FP32[0], BF16[0]], ids=str)
def test_large_maps_are_normalised_alike_in_every_batch(models: Models, tuning: Tuning) -> None:
    """With two threads and 32x32 pixels, torch's own kernel gives one row other bits than two."""
    resident = ResidentModel(tune(models[BASE], tuning))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        norm = TunedGroupNorm(4, 16)
        x = torch.randn(4, 16, 32, 33).contiguous(memory_format=torch.channels_last)
        for rows in (1, 2, 3):
            assert torch.equal(norm(x[:rows]), norm(x)[:rows])
        assert largest(norm(x), torch.nn.functional.group_norm(x, 4)) < 1e-5
    finally:
        torch.set_num_threads(before)
    assert any(isinstance(one, TunedGroupNorm) for one in resident.model.unet.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 320, 8, 8), (3, 40, 5, 7), (8, 64, 32, 32), (5, 72)])
def test_silu_of_equal_rows_is_equal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """81920 elements are shared among three of four threads: torch's own gives a row in the middle other bits."""
    row = torch.randn(1, *shape[1:]).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        alone = even_silu_(dense(row.clone()))
        rows = even_silu_(dense(row.expand(shape).clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, alone[0]) for one in rows)
    expected = torch.nn.functional.silu(row.float())
    assert largest(alone, expected) < (1e-6 if dtype == torch.float32 else 0.02)


def dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def test_unknown_tunings_are_refused() -> None:
    assert Tuning.from_json(Tuning("bfloat16", packed=True).to_json()) == Tuning("bfloat16", packed=True)
    for data in ({"dtype": "int8"}, {"attention": "flash"}, {"speed": 1}):
        with pytest.raises(ValueError, match=r"expected dtype float32, bfloat16 or float16|no tuning"):
            Tuning.from_json(data)


@pytest.mark.parametrize("tuning", FP32, ids=str)
def test_pictures_are_encoded_alike_in_whatever_order_their_pixels_lie(models: Models, tuning: Tuning) -> None:
    """As they come from a picture, [H, W, 3], none of the ways to lay out [1, 3, H, W] is told by their strides."""
    pixels = to_pixels(Image.effect_noise((64, 48), 90).convert("RGB"))
    tuned = tune(models[BASE], tuning)
    expected = models[BASE].posterior(pixels.contiguous())
    for given in (pixels, pixels.contiguous(), pixels.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(tuned.posterior(given).mean, expected.mean, rtol=0, atol=1e-5)


def test_weights_that_are_packed_are_copied_once(models: Models) -> None:
    """For other sizes the original's serve as they are."""
    tuned, unet = tune(models[BASE], default_tuning(CPU)).unet, models[BASE].unet
    own = {tensor.data_ptr() for tensor in unet.parameters()}
    kept = {one.weight.data_ptr() for one in tuned.modules() if isinstance(one, PackedConv)}
    assert bool(kept) == can_pack()
    assert kept <= own
