"""The published structures at tiny widths, by the names of their models.

Levels, where attention sits, the rule for heads, inputs and flags are theirs (latent-diffusion's and Stable
Diffusion's configs); 2 norm groups for 32, 2 heads for 8, heads of width 4 for 32, contexts of width 16.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

from models.config import AutoencoderConfig, UNetConfig

CONTEXT: Final = 16
POOLED: Final = 10
"""Width of SDXL's pooled text."""
SIZES: Final = (64, 48, 0, 0, 64, 48)
"""Of a picture, as SDXL's UNet is told them."""


def _text(base: int, multiples: tuple[int, ...], attention: Iterable[int], **options: Any) -> UNetConfig:
    """`attention` levels, finest first, with transformers."""
    return _unet("CrossAttn", base, multiples, attention, {"cross_attention_dim": CONTEXT, **options})


def _plain(base: int, multiples: tuple[int, ...], attention: Iterable[int], **options: Any) -> UNetConfig:
    """`attention` levels, finest first, with self-attention; nothing attends to a context."""
    return _unet("Attn", base, multiples, attention, {"cross_attention_dim": None, **options})


def _unet(
    kind: str, base: int, multiples: tuple[int, ...], attention: Iterable[int], options: dict[str, Any]
) -> UNetConfig:
    levels, with_attention = range(len(multiples)), set(attention)
    in_resnets = options.get("downsample_type") == "resnet"
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if in_resnets else ("DownBlock2D", "UpBlock2D")
    defaults: dict[str, Any] = {"sample_size": 8, "attention_head_dim": 2, "norm_num_groups": 2}
    return UNetConfig(
        block_out_channels=tuple(base * multiple for multiple in multiples),
        down_block_types=tuple(f"{kind}DownBlock2D" if level in with_attention else down for level in levels),
        up_block_types=tuple(f"{kind}UpBlock2D" if level in with_attention else up for level in reversed(levels)),
        **{**defaults, **options},
    )


_UPDOWN: Final[dict[str, Any]] = {"downsample_type": "resnet", "upsample_type": "resnet"}
_THREE: Final[dict[str, Any]] = {"in_channels": 3, "out_channels": 3}

_SD1: Final = _text(4, (1, 2, 4, 4), (0, 1, 2))
_SD2: Final = dataclasses.replace(_SD1, attention_head_dim=(1, 2, 4, 4), use_linear_projection=True)
_CELEBA: Final = _plain(4, (1, 2, 3, 4), (1, 2, 3), attention_head_dim=4, **_THREE)

SDXL: Final = _text(
    4,
    (1, 2, 4),
    (1, 2),
    attention_head_dim=(1, 2, 4),
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=POOLED + 6 * 4,
)

UNETS: Final[dict[str, UNetConfig]] = {
    "text2im_large": _SD1,
    "sr_4x": _plain(4, (1, 2, 2, 4), (3,), attention_head_dim=4, in_channels=6, out_channels=3),
    "inpainting_big": _plain(
        4, (1, 2, 3, 4), (1, 2, 3), in_channels=7, out_channels=3, attention_head_dim=(2, 4, 6, 8), **_UPDOWN
    ),
    "cin256_v2": _text(4, (1, 2, 3, 5), (1, 2, 3), attention_head_dim=1, **_THREE),
    "cin256": _text(4, (1, 2, 4), (0, 1, 2), attention_head_dim=(1, 2, 4)),
    "celeba": _CELEBA,
    "churches": _plain(
        4,
        (1, 2, 2, 4, 4),
        (0, 1, 2, 3),
        sample_size=16,
        attention_head_dim=(2, 4, 4, 8, 8),
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=2,
        **_UPDOWN,
    ),
    "layout2img": _text(
        4, (1, 2, 3, 4), (1, 2, 3), attention_head_dim=(1, 2, 3, 4), transformer_layers_per_block=3, **_THREE
    ),
    "semantic": _plain(4, (1, 4, 8), (), in_channels=6, out_channels=3, attention_head_dim=4),
    "sd1": _SD1,
    "sd_inpaint": dataclasses.replace(_SD1, in_channels=9),
    "sd2": _SD2,
    "sd2_v": dataclasses.replace(_SD2, sample_size=12, upcast_attention=True),
    "sd2_inpaint": dataclasses.replace(_SD2, in_channels=9),
    "sd_turbo": _SD2,
    "sd_x4": _text(
        4,
        (1, 2, 2, 4),
        (1, 2, 3),
        in_channels=7,
        use_linear_projection=True,
        only_cross_attention=(True, True, True, False),
        num_class_embeds=1000,
    ),
    "sdxl": SDXL,
    "depths per level": dataclasses.replace(_SD2, transformer_layers_per_block=(1, 2, 3, 1)),
    "scale_shift without norm in the middle": _plain(
        4, (1, 2), (1,), attention_head_dim=None, resnet_time_scale_shift="scale_shift"
    ),
    "no attention in the middle": _plain(4, (1, 2), (1,), attention_head_dim=8, add_attention=False),
    "convolutions resample without attention, res-blocks with": dataclasses.replace(
        _plain(4, (1, 2, 2), (1, 2), attention_head_dim=4), **_UPDOWN
    ),
    "transformers beside scale_shift and res-blocks that resample": dataclasses.replace(
        _text(4, (1, 2, 2), (1,), resnet_time_scale_shift="scale_shift"),
        down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}


def _kl(*widths: int, **options: Any) -> AutoencoderConfig:
    return AutoencoderConfig(block_out_channels=widths, norm_num_groups=2, sample_size=64, **options)


def _vq(*widths: int, **options: Any) -> AutoencoderConfig:
    return _kl(
        *widths, scaling_factor=1.0, force_upcast=False, **{"codebook_size": 24, "latent_channels": 3, **options}
    )


AUTOENCODERS: Final[dict[str, AutoencoderConfig]] = {
    "kl_f8": _kl(4, 8, 16, 16),
    "kl_f4": _kl(4, 8, 16, latent_channels=3),
    "kl_f4_x4": _kl(4, 8, 16, scaling_factor=0.08333),
    "vq_f4": _vq(4, 8, 16),
    "vq_f4_noattn": _vq(4, 8, 16, mid_block_add_attention=False),
    "vq_f8": _vq(4, 8, 8, 16, latent_channels=4, attention_levels=(3,)),
    "kl_f1": _kl(4),
    "kl_f2": _kl(4, 6),
    "kl_f16": _kl(4, 4, 8, 8, 16, latent_channels=16, attention_levels=(4,)),
    "kl_f32": _kl(4, 4, 8, 8, 16, 16, latent_channels=64, attention_levels=(4, 5)),
    "kl without 1x1 convolutions": _kl(4, 8, use_quant_conv=False, use_post_quant_conv=False),
}
