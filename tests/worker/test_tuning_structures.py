"""The tuned form of every published structure against diffusers, and against the plain form for guided rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.unet import UNet
from tests.models.small import randomise, theirs
from tests.models.structures import AUTOENCODERS, CONTEXT, SIZES, UNETS
from worker.engine.tuned_layers import pack_at_next_call
from worker.engine.tuning import TunedUNet, Tuning, Workshop, candidates

TOLERANCE = 5e-5
FP32 = [one for one in candidates(torch.device("cpu"), "float32") if one.packed == (one.attention == "fused")]
UNLIKE = ["sd2_v", "sd_x4", "sdxl", "churches", "inpainting_big", "semantic"]
"""One structure of each kind."""


def unet_of(name: str) -> UNet:
    unet = UNet(UNETS[name])
    randomise(unet, even=True)
    return unet


def autoencoder_of(name: str) -> Autoencoder:
    autoencoder = Autoencoder(AUTOENCODERS[name])
    randomise(autoencoder, even=True)
    return autoencoder


def tuned_autoencoder(plain: Autoencoder, tuning: Tuning) -> Autoencoder:
    tuned = Workshop(tuning).tree(plain)
    assert isinstance(tuned, Autoencoder)
    return tuned


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def inputs(unet: UNet, k: int = 1) -> Inputs:
    """x, t, context of k * 2 rows; labels and pooled text of k * 2 rows if the structure has them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, *unet.config.size, generator=generator)
    context = torch.randn(2 * k, 6, CONTEXT, generator=generator)
    labels = None if unet.class_embedding is None else torch.tensor([999, 20])
    pooled = torch.randn(2 * k, unet.config.pooled_width, generator=generator)
    return x, torch.tensor([981, 3]), context, labels, pooled if pooled.numel() else None


def sizes(pooled: Tensor) -> Tensor:
    return torch.tensor([SIZES] * len(pooled))


def denoise(unet: UNet, x: Tensor, t: Tensor, context: Tensor, labels: Tensor | None, pooled: Tensor | None) -> Tensor:
    with torch.inference_mode():
        # Row by row: the engine, too, makes it for every picture apart.
        added = [] if pooled is None else [unet.embed_addition(row, sizes(row)) for row in torch.split(pooled, 1)]
        emb = unet.embed(t, labels, torch.cat(added) if added else None)
        kv = unet.project_context(context.to(emb.dtype)) if unet.config.cross_attention_dim is not None else []
        return unet.denoise(x.to(emb.dtype), emb, kv)


@pytest.mark.parametrize("tuning", FP32, ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_unets(name: str, tuning: Tuning) -> None:
    plain = unet_of(name)
    tuned = TunedUNet(plain, Workshop(tuning))
    x, t, context, labels, pooled = given = inputs(plain)
    more: dict[str, Any] = {} if plain.config.cross_attention_dim is None else {"encoder_hidden_states": context}
    if pooled is not None:
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes(pooled)}
    with torch.no_grad():
        expected = theirs(plain)(x, t, class_labels=labels, **more).sample
    pack_at_next_call(tuned)
    torch.testing.assert_close(denoise(tuned, *given), expected, rtol=0, atol=TOLERANCE)
    guided = inputs(plain, k=2)
    found, expected = denoise(tuned, *guided), denoise(plain, *guided)
    assert found.shape[0] == (2 if plain.config.cross_attention_dim is None else 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", UNLIKE)
def test_rows_of_one_batch_are_equal_to_the_bit(name: str) -> None:
    tuned = TunedUNet(unet_of(name), Workshop(FP32[0]))
    first: Any = [None if one is None else torch.cat([one[:1]] * 2) for one in inputs(tuned)]
    found = denoise(tuned, *first)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("tuning", FP32, ids=str)
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders(name: str, tuning: Tuning) -> None:
    plain = autoencoder_of(name)
    tuned, oracle = tuned_autoencoder(plain, tuning), theirs(plain)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 32, 64, generator=generator) * 2 - 1
    latents = torch.randn(2, plain.config.latent_channels, 5, 4, generator=generator)
    with torch.inference_mode():
        encoded, decoded = oracle.encode(pixels), oracle.decode(latents).sample
        mean = encoded.latents if plain.config.codebook_size is not None else encoded.latent_dist.mean
        torch.testing.assert_close(tuned.encode(pixels).mean, mean, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(tuned.decode(latents), decoded, rtol=0, atol=TOLERANCE)


def test_codes_are_searched_in_fp32_whatever_the_decoder_runs_in() -> None:
    """In bf16 1.0045 is 1.0078."""
    tuned = tuned_autoencoder(autoencoder_of("vq_f4"), Tuning("bfloat16"))
    assert tuned.quantize is not None
    near, far = torch.tensor([1.0, 0, 0]), torch.tensor([1.01, 0, 0])
    tuned.quantize.embedding.weight[:2] = torch.stack([near, far])
    latents = torch.tensor([1.0045, 0, 0])
    with torch.inference_mode():
        found, nearest, farther = (tuned.decode(one.expand(1, 4, 4, 3).movedim(3, 1)) for one in (latents, near, far))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, nearest)
    assert not torch.equal(nearest, farther)


def test_sizes_not_packed_for_are_right_too() -> None:
    plain = unet_of("churches")
    tuned = TunedUNet(plain, Workshop(Tuning(packed=FP32[0].packed)))
    x, t, context, labels, pooled = inputs(plain)
    pack_at_next_call(tuned)
    denoise(tuned, x, t, context, labels, pooled)
    other = torch.randn(1, plain.config.in_channels, 16, 32)
    found = denoise(tuned, other, t[:1], context, labels, pooled)
    torch.testing.assert_close(found, denoise(plain, other, t[:1], context, labels, pooled), rtol=0, atol=TOLERANCE)
