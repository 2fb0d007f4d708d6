"""The UNets of all published structures against diffusers', and the parts of their interface against one another."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention import (
    Attention,
    attend_with,
    fused_attention,
    plain_attention,
    set_attention,
)
from models.config import UNetConfig
from models.unet import UNet
from tests.models.small import UNET, randomise, theirs
from tests.models.structures import CONTEXT, SIZES, UNETS

every_structure = pytest.mark.parametrize("name", UNETS)
TOLERANCE = 5e-5


def random_unet(config: UNetConfig) -> UNet:
    unet = UNet(config)
    randomise(unet, even=True)
    return unet


def unet_of(changes: dict[str, Any]) -> UNet:
    return random_unet(UNetConfig(**{**vars(UNET), **changes}))


def inputs(config: UNetConfig, size: tuple[int, int], rows: int = 2, k: int = 1) -> tuple[Tensor, ...]:
    """x, t, context of k * rows or empty, labels or empty, pooled text of k * rows or empty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, config.in_channels, *size, generator=generator)
    t = torch.tensor([981, 3, 500])[:rows]
    context = torch.randn(k * rows, 6, config.context_width, generator=generator)
    labels = torch.tensor([4, 1, 0])[: rows if config.num_class_embeds is not None else 0]
    pooled = torch.randn(k * rows, config.pooled_width, generator=generator)
    return x, t, context, labels, pooled


def addition(unet: UNet, pooled: Tensor) -> Tensor | None:
    return unet.embed_addition(pooled, torch.tensor([SIZES] * len(pooled))) if pooled.numel() else None


def forward(unet: UNet, x: Tensor, t: Tensor, context: Tensor, labels: Tensor, pooled: Tensor) -> Tensor:
    given = (context if context.numel() else None, labels if len(labels) else None, addition(unet, pooled))
    return unet(x, t, *given)  # type: ignore[no-any-return]


def expected_of(unet: UNet, x: Tensor, t: Tensor, context: Tensor, labels: Tensor, pooled: Tensor) -> Tensor:
    oracle = theirs(unet)
    more: dict[str, Any] = {"encoder_hidden_states": context} if context.numel() else {}
    if pooled.numel():
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.tensor([SIZES] * len(pooled))}
    with torch.no_grad():
        out: Tensor = oracle(x, t, class_labels=labels if len(labels) else None, **more).sample
    assert out.std() > 0.1
    return out


@every_structure
def test_forward_is_that_of_diffusers(name: str) -> None:
    unet = random_unet(UNETS[name])
    given = inputs(unet.config, unet.config.size)
    torch.testing.assert_close(forward(unet, *given), expected_of(unet, *given), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [(13, 11), (5, 6)], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sd_x4"])
def test_odd_sizes_come_back_as_they_went_down(name: str, size: tuple[int, int]) -> None:
    unet = random_unet(UNETS[name])
    given = inputs(unet.config, size)
    torch.testing.assert_close(forward(unet, *given), expected_of(unet, *given), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["churches", "inpainting_big", "celeba"])
def test_odd_sizes_go_through_what_diffusers_has_none_for(name: str) -> None:
    unet = random_unet(UNETS[name])
    given = inputs(unet.config, (21, 18))
    assert forward(unet, *given).shape == (2, unet.config.out_channels, 21, 18)


def test_other_epsilons_and_groups_are_honoured() -> None:
    unet = unet_of({"in_channels": 9, "norm_num_groups": 4, "norm_eps": 1e-3})
    given = inputs(unet.config, (8, 8))
    torch.testing.assert_close(forward(unet, *given), expected_of(unet, *given), rtol=0, atol=TOLERANCE)


@every_structure
def test_a_wrong_epsilon_would_show(name: str) -> None:
    """In any kind of norm, in any structure: what these tests are worth."""
    unet = random_unet(UNETS[name])
    given = inputs(unet.config, unet.config.size)
    right = forward(unet, *given)
    kinds: dict[str, list[nn.GroupNorm | nn.LayerNorm]] = {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            kinds.setdefault(path.rpartition(".")[2], []).append(module)
    for norms in kinds.values():
        before = [norm.eps for norm in norms]
        for norm in norms:
            norm.eps = 1e-6 if norm.eps > 5e-6 else 1e-5
        assert (forward(unet, *given) - right).abs().max() > 2 * TOLERANCE
        for norm, eps in zip(norms, before, strict=True):
            norm.eps = eps


@every_structure
def test_guided_rows_share_what_comes_before_the_text(name: str) -> None:
    """`denoise` of P rows with [unconditional P | conditional P] keys equals the forward of the doubled batch; without
    text there is nothing to guide, and P rows stay P."""
    unet = random_unet(UNETS[name])
    x, t, context, labels, pooled = inputs(unet.config, (16, 16), rows=3, k=2)
    emb = unet.embed(t, labels if len(labels) else None, addition(unet, pooled))
    if not context.numel():
        assert unet.project_context(context) == []
        torch.testing.assert_close(
            unet.denoise(x, emb, []), forward(unet, x, t, context, labels, pooled), rtol=0, atol=0
        )
        return
    shared = unet.denoise(x, emb, unet.project_context(context))
    doubled = forward(unet, x.repeat(2, 1, 1, 1), t.repeat(2), context, labels.repeat(2), pooled)
    assert shared.shape[0] == 6
    assert (shared[:3] - shared[3:]).abs().max() > 1e-3
    torch.testing.assert_close(shared, doubled, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["sd1", "sd_x4", "sdxl", "churches"])
def test_rows_do_not_see_each_other(name: str) -> None:
    unet = random_unet(UNETS[name])
    given = inputs(unet.config, (16, 16), rows=3)
    together = forward(unet, *given)
    for row in range(3):
        alone = forward(unet, *(tensor[row : row + 1] for tensor in given))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=TOLERANCE)


def test_plain_attention_equals_the_fused_kernel() -> None:
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(plain_attention(q, k, v), fused_attention(q, k, v), rtol=0, atol=1e-6)
    unet = random_unet(UNETS["sd2_v"])
    given = inputs(unet.config, (8, 8))
    fused = forward(unet, *given)
    set_attention(unet, plain_attention)
    torch.testing.assert_close(forward(unet, *given), fused, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attend", [fused_attention, plain_attention])
def test_upcast_scores_may_leave_the_range_of_fp16(attend: Any) -> None:
    """SD 2.1's do, which says `upcast_attention`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (300 * torch.randn(3, 1, 2, 16, 8, generator=generator)).half().unbind(0)
    expected = fused_attention(q.float(), k.float(), v.float())
    found = attend_with(attend, upcast=True)(q, k, v)
    assert found.dtype == torch.float16
    assert (found.float() - expected).norm() / expected.norm() < 2e-3
    assert not plain_attention(q, k, v).isfinite().all()


def test_attention_is_upcast_where_the_structure_says_so() -> None:
    for name, upcast in (("sd2_v", True), ("sd2", False)):
        attentions = [one for one in UNet(UNETS[name]).modules() if isinstance(one, Attention)]
        assert attentions
        assert all(one.upcast is upcast for one in attentions)


def test_labels_go_with_a_class_embedding() -> None:
    t, labels = torch.tensor([5]), torch.tensor([1])
    with pytest.raises(ValueError, match="expects none"):
        unet_of({}).embed(t, labels)
    with pytest.raises(ValueError, match="expects one per row"):
        unet_of({"num_class_embeds": 5}).embed(t)


def test_keys_come_in_the_order_in_which_they_are_taken() -> None:
    """Levels without self-attention take two entries for each transformer block."""
    unet = random_unet(UNETS["sd_x4"])
    kv = unet.project_context(torch.randn(1, 6, CONTEXT))
    only_cross, both = 2 * (2 + 3), 2 + 3 + 1  # blocks of levels 1 and 2, of level 3 and of the middle
    assert len(kv) == 2 * only_cross + both
