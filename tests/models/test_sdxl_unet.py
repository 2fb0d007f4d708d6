"""SDXL's UNet (Podell et al. 2023), whose rows differ in their embedding, against diffusers'."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import UNetConfig, UnsupportedStructure
from models.unet import UNet
from tests.models.small import diffusers, randomise, theirs
from tests.models.structures import CONTEXT, POOLED, SDXL, UNETS
from worker.engine.tuning import Dtype, TunedUNet, Tuning, Workshop, candidates

TOLERANCE = 5e-5

PUBLISHED: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
"""What is not a default in the base model's config.json."""


@pytest.fixture(scope="module")
def unet() -> UNet:
    unet = UNet(SDXL)
    randomise(unet, even=True)
    return unet


def inputs(rows: int = 2, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, t of `rows`, context, pooled and sizes of k * rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, 13, 10, generator=generator)
    t = torch.tensor([981, 3, 500])[:rows]
    context = torch.randn(k * rows, 6, CONTEXT, generator=generator)
    pooled = torch.randn(k * rows, POOLED, generator=generator)
    sizes = torch.randint(0, 1025, (k * rows, 6), generator=generator)
    return x, t, context, pooled, sizes


def expected_of(unet: UNet, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
    k = len(context) // len(x)
    added = {"text_embeds": pooled, "time_ids": sizes}
    with torch.no_grad():
        out: Tensor = theirs(unet)(x.repeat(k, 1, 1, 1), t.repeat(k), context, added_cond_kwargs=added).sample
    assert out.std() > 0.1
    return out


@pytest.mark.parametrize("k", [1, 2])
def test_forward_is_that_of_diffusers(unet: UNet, k: int) -> None:
    x, t, context, pooled, sizes = inputs(k=k)
    found = unet(x, t, context, addition=unet.embed_addition(pooled, sizes))
    torch.testing.assert_close(found, expected_of(unet, x, t, context, pooled, sizes), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tuning", candidates(torch.device("cpu"), "float32"), ids=str)
def test_tuned_forward_is_that_of_diffusers(unet: UNet, tuning: Tuning) -> None:
    x, t, context, pooled, sizes = inputs()
    with torch.inference_mode():
        tuned = TunedUNet(unet, Workshop(tuning)).eval()
        found = tuned(x, t, context, addition=tuned.embed_addition(pooled, sizes))
    torch.testing.assert_close(found, expected_of(unet, x, t, context, pooled, sizes), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("dtype", "far"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_near(dtype: Dtype, far: float) -> None:
    unet = UNet(SDXL)
    randomise(unet)
    x, t, context, pooled, sizes = inputs()
    expected = expected_of(unet, x, t, context, pooled, sizes)
    with torch.inference_mode():
        half = TunedUNet(unet, Workshop(Tuning(dtype))).eval()
        of_type = Tuning(dtype).torch_dtype
        found = half(x.to(of_type), t, context.to(of_type), addition=half.embed_addition(pooled.to(of_type), sizes))
    assert found.dtype == of_type
    assert (found.float() - expected).norm() / expected.norm() < far


def test_pooled_text_and_every_size_count(unet: UNet) -> None:
    *_, pooled, sizes = inputs(1, 1)
    before = unet.embed_addition(pooled, sizes)
    for place in range(6):
        other = sizes.clone()
        other[0, place] += 64
        assert (unet.embed_addition(pooled, other) - before).abs().max() > 1e-3
    assert (unet.embed_addition(-pooled, sizes) - before).abs().max() > 1e-3


def test_an_addition_goes_with_its_embedding(unet: UNet) -> None:
    *_, pooled, sizes = inputs()
    with pytest.raises(ValueError, match="addition: this UNet expects one per row"):
        unet.embed(torch.tensor([5]))
    plain = UNet(UNETS["sd1"])
    with pytest.raises(ValueError, match="addition: this UNet expects none"):
        plain.embed(torch.tensor([5]), None, unet.embed_addition(pooled, sizes))
    with pytest.raises(ValueError, match="pooled texts: this UNet expects none"):
        plain.embed_addition(pooled, sizes)


def test_published_structure() -> None:
    """Names and shapes of all its parameters are those of diffusers; none is allocated."""
    config = UNetConfig.from_dict(PUBLISHED)
    assert config.pooled_width == 1280
    assert UNetConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        ours, peer = UNet(config), diffusers.UNet2DConditionModel.from_config(PUBLISHED)
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in peer.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 2_567_463_684


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type='image' is not supported; expected None or 'text_time"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim=None; expected one positive integer"),
        ({"projection_class_embeddings_input_dim": 24}, "24: expected more than 6 times addition_time_embed_dim"),
        ({"addition_embed_type": None}, "without addition_embed_type: expected None"),
        ({"cross_attention_dim": None}, "means nothing to a UNet2DModel|are not supported"),
    ],
)
def test_refused_structures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UnsupportedStructure), match=message):
        dataclasses.replace(SDXL, **changes)
