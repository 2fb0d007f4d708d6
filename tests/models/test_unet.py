"""The UNet against diffusers' `UNet2DConditionModel`, and the parts of its interface against one another."""

from typing import Any

import pytest
import torch

from models.attention import fused_attention, plain_attention, set_attention
from models.config import UNetConfig
from models.unet import UNet
from tests.models.small import UNET, diffusers, randomise

CROSS, PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")

STRUCTURES: dict[str, dict[str, Any]] = {
    "SD 1: conv projection, a number of heads": {
        "block_out_channels": (8, 12, 16),
        "down_block_types": (CROSS[0], CROSS[0], CROSS[1]),
        "up_block_types": (PLAIN[1], PLAIN[0], PLAIN[0]),
        "layers_per_block": 2,
    },
    "SD 2: linear projection, heads per level, two blocks deep": {
        "block_out_channels": (4, 8, 16),
        "down_block_types": (CROSS[0],) * 3,
        "up_block_types": (PLAIN[0],) * 3,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
    },
    "upscaler: noise levels as classes": {"in_channels": 7, "num_class_embeds": 5, "use_linear_projection": True},
    "other epsilon, other norm groups": {"in_channels": 9, "norm_num_groups": 4, "norm_eps": 1e-3},
}


def unet_of(changes: dict[str, Any]) -> UNet:
    unet = UNet(UNetConfig(**{**vars(UNET), **changes}))
    randomise(unet)
    return unet


@pytest.mark.parametrize("size", [(8, 8), (13, 11), (5, 6)], ids=str)
@pytest.mark.parametrize("changes", STRUCTURES.values(), ids=STRUCTURES)
def test_forward_is_that_of_diffusers(changes: dict[str, Any], size: tuple[int, int]) -> None:
    ours = unet_of(changes)
    theirs = diffusers.UNet2DConditionModel.from_config(ours.config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the parameters have the same names
    x = torch.randn(2, ours.config.in_channels, *size)
    t = torch.tensor([981, 3])
    context = torch.randn(2, 6, 16)
    labels = torch.tensor([4, 1]) if "num_class_embeds" in changes else None
    with torch.no_grad():
        expected = theirs(x, t, context, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, context, labels), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("changes", STRUCTURES.values(), ids=STRUCTURES)
def test_guided_rows_share_what_comes_before_the_text(changes: dict[str, Any]) -> None:
    """`denoise` of P rows with [unconditional P | conditional P] keys equals the forward of the doubled batch."""
    unet = unet_of(changes)
    x = torch.randn(3, unet.config.in_channels, 8, 6)
    t = torch.tensor([900, 500, 20])
    context = torch.randn(6, 6, 16)
    labels = torch.tensor([0, 1, 2]) if "num_class_embeds" in changes else None
    shared = unet.denoise(x, unet.embed(t, labels), unet.project_context(context))
    doubled = unet(x.repeat(2, 1, 1, 1), t.repeat(2), context, None if labels is None else labels.repeat(2))
    assert shared.shape[0] == 6
    assert (shared[:3] - shared[3:]).abs().max() > 1e-4
    torch.testing.assert_close(shared, doubled, rtol=0, atol=1e-5)


def test_rows_do_not_see_each_other() -> None:
    unet = unet_of({})
    x, t, context = torch.randn(3, 4, 8, 8), torch.tensor([999, 400, 0]), torch.randn(3, 6, 16)
    together = unet(x, t, context)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], unet(x[one], t[one], context[one]), rtol=0, atol=1e-5)


def test_plain_attention_equals_the_fused_kernel() -> None:
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(plain_attention(q, k, v), fused_attention(q, k, v), rtol=0, atol=1e-6)
    unet = unet_of({})
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 6, 16))
    fused = unet(*inputs)
    set_attention(unet, plain_attention)
    torch.testing.assert_close(unet(*inputs), fused, rtol=0, atol=5e-6)


def test_labels_go_with_a_class_embedding() -> None:
    t, labels = torch.tensor([5]), torch.tensor([1])
    with pytest.raises(ValueError, match="expects none"):
        unet_of({}).embed(t, labels)
    with pytest.raises(ValueError, match="expects one per row"):
        unet_of({"num_class_embeds": 5}).embed(t)
