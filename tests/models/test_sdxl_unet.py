"""What SDXL's UNet (Podell et al. 2023) embeds beside the timestep, and its published structure."""

import dataclasses
from typing import Any

import pytest
import torch

from models.config import UNetConfig, UnsupportedStructure
from models.unet import UNet
from tests.models.small import diffusers, randomise
from tests.models.structures import POOLED, SDXL, SIZES, UNETS

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


def test_pooled_text_and_every_size_count(unet: UNet) -> None:
    pooled, sizes = torch.randn(1, POOLED), torch.tensor([SIZES])
    before = unet.embed_addition(pooled, sizes)
    for place in range(6):
        other = sizes.clone()
        other[0, place] += 64
        assert (unet.embed_addition(pooled, other) - before).abs().max() > 1e-3
    assert (unet.embed_addition(-pooled, sizes) - before).abs().max() > 1e-3


def test_an_addition_goes_with_its_embedding(unet: UNet) -> None:
    pooled, sizes = torch.randn(1, POOLED), torch.tensor([SIZES])
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
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim=None; expected one integer from 1"),
        ({"projection_class_embeddings_input_dim": 24}, "24: expected more than 6 times addition_time_embed_dim"),
        ({"addition_embed_type": None}, "without addition_embed_type: expected None"),
        ({"cross_attention_dim": None}, "means nothing to a UNet2DModel|are not supported"),
    ],
)
def test_refused_structures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UnsupportedStructure), match=message):
        dataclasses.replace(SDXL, **changes)
