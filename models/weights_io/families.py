"""The published families of models, and what the shapes in a file cannot tell of them."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, NamedTuple, TypeVar

from models.config import ScheduleConfig, UNetConfig, UnsupportedStructure
from models.weights_io.recognise import GROUPS, UNetStructure

ConditionerKind = Literal["clip", "open_clip", "clip_pair", "bert", "layout", "class", "semantic"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
T = TypeVar("T", int, bool)


class Signs(NamedTuple):
    """By what a family is recognised. `codebook`: whether the autoencoder has one."""

    conditioner: ConditionerKind | None
    in_channels: int
    out_channels: int
    codebook: bool


class Other(NamedTuple):
    """What only the user can tell: that a file is of these `models`."""

    prediction_type: PredictionType
    latent_size: int
    models: str


@dataclasses.dataclass(frozen=True)
class Family:
    """`heads` is the number of attention heads, or `head_width` the width of each. `latent_size` is the side of the
    latents in training. `use_ema`: whether the original scripts sample with the averaged weights where a file has both.
    `unconditional_class`: whether the last class stands for none. `width_of_sizes`: of the sinusoids of each size that
    the UNet embeds. `other`: what else has the same shapes.
    """

    name: str
    signs: tuple[Signs, ...]
    beta_start: float
    beta_end: float
    latent_size: int
    heads: int | None = None
    head_width: int | None = None
    scaling_factor: float = 1.0
    prediction_type: PredictionType = "epsilon"
    use_ema: bool = True
    unconditional_class: bool = False
    upcast_attention: bool = False
    width_of_sizes: int | None = None
    other: Other | None = None

    def size(self, prediction_type: PredictionType | None) -> int:
        """Side of the latents in training."""
        other = self.other
        return other.latent_size if other and other.prediction_type == prediction_type else self.latent_size

    def schedule(self, prediction_type: PredictionType | None) -> ScheduleConfig:
        return ScheduleConfig(
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction_type=prediction_type or self.prediction_type,
        )

    def heads_of(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        if self.heads is not None:
            return (self.heads,) * len(widths)
        assert self.head_width is not None
        return tuple(width // self.head_width for width in widths)

    def unet_config(self, structure: UNetStructure, latent_size: int) -> UNetConfig:
        text = structure.context is not None
        kind = "CrossAttn" if text else "Attn"
        kind_of_plain = "Resnet{}sampleBlock2D" if structure.updown else "{}Block2D"
        down, up = kind_of_plain.format("Down"), kind_of_plain.format("Up")
        heads = self.heads_of(structure.widths)
        common = UNetConfig(
            sample_size=latent_size,
            in_channels=structure.in_channels,
            out_channels=structure.out_channels,
            block_out_channels=structure.widths,
            down_block_types=tuple(f"{kind}DownBlock2D" if a else down for a in structure.attention),
            up_block_types=tuple(f"{kind}UpBlock2D" if a else up for a in reversed(structure.attention)),
            layers_per_block=structure.layers,
            attention_head_dim=_one_or_all(heads if text else _widths_of_heads(structure.widths, heads)),
            norm_num_groups=GROUPS,
            num_class_embeds=structure.classes,
            resnet_time_scale_shift="scale_shift" if structure.scale_shift else "default",
            cross_attention_dim=structure.context,
        )
        if text:
            return dataclasses.replace(
                common,
                transformer_layers_per_block=_one_or_all(structure.depths),
                use_linear_projection=structure.linear,
                only_cross_attention=_one_or_all(structure.only_cross),
                upcast_attention=self.upcast_attention,
                addition_embed_type=None if structure.added is None else "text_time",
                addition_time_embed_dim=None if structure.added is None else self.width_of_sizes,
                projection_class_embeddings_input_dim=structure.added,
            )
        resampling = "resnet" if structure.updown else "conv"
        return dataclasses.replace(
            common,
            downsample_type=resampling,
            upsample_type=resampling,
            attn_norm_num_groups=GROUPS if structure.scale_shift else None,
            add_attention=structure.middle is not None,
        )


def _widths_of_heads(widths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(width // number for width, number in zip(widths, heads, strict=True))


def _one_or_all(values: tuple[T, ...]) -> T | tuple[T, ...]:
    return values[0] if len(set(values)) == 1 else values


# Betas, scales, heads and whether averaged weights are used: the yaml files of the original repositories.
FAMILIES: Final = (
    Family(
        "Stable Diffusion 1",
        (Signs("clip", 4, 4, codebook=False), Signs("clip", 9, 4, codebook=False)),
        beta_start=0.00085,
        beta_end=0.012,
        latent_size=64,
        heads=8,
        scaling_factor=0.18215,
        use_ema=False,
    ),
    Family(
        "Stable Diffusion 2",
        (Signs("open_clip", 4, 4, codebook=False),),
        beta_start=0.00085,
        beta_end=0.012,
        latent_size=96,
        head_width=64,
        scaling_factor=0.18215,
        prediction_type="v_prediction",
        use_ema=False,
        upcast_attention=True,
        other=Other("epsilon", 64, "2.0-base, 2.1-base and sd-turbo"),
    ),
    Family(
        "Stable Diffusion 2 inpainting",
        (Signs("open_clip", 9, 4, codebook=False),),
        beta_start=0.00085,
        beta_end=0.012,
        latent_size=64,
        head_width=64,
        scaling_factor=0.18215,
        use_ema=False,
    ),
    Family(
        "Stable Diffusion x4 upscaler",
        (Signs("open_clip", 7, 4, codebook=False),),
        beta_start=0.0001,
        beta_end=0.02,
        latent_size=128,
        heads=8,
        scaling_factor=0.08333,
        prediction_type="v_prediction",
        use_ema=False,
    ),
    Family(
        "Stable Diffusion XL",
        (Signs("clip_pair", 4, 4, codebook=False), Signs("clip_pair", 9, 4, codebook=False)),
        beta_start=0.00085,
        beta_end=0.012,
        latent_size=128,
        head_width=64,
        scaling_factor=0.13025,
        use_ema=False,
        width_of_sizes=256,
    ),
    Family(
        "latent diffusion, text to image",
        (Signs("bert", 4, 4, codebook=False),),
        beta_start=0.00085,
        beta_end=0.012,
        latent_size=32,
        heads=8,
        scaling_factor=0.18215,
        use_ema=False,
    ),
    Family(
        "latent diffusion, layout to image",
        (Signs("layout", 3, 3, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0205,
        latent_size=64,
        head_width=32,
    ),
    Family(
        "latent diffusion, ImageNet classes (cin256-v2)",
        (Signs("class", 3, 3, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0195,
        latent_size=64,
        heads=1,
        use_ema=False,
        unconditional_class=True,
    ),
    Family(
        "latent diffusion, ImageNet classes (cin256)",
        (Signs("class", 4, 4, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0195,
        latent_size=32,
        head_width=32,
    ),
    Family(
        "latent diffusion, super resolution",
        (Signs(None, 6, 3, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0155,
        latent_size=64,
        head_width=32,
    ),
    Family(
        "latent diffusion, inpainting",
        (Signs(None, 7, 3, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0205,
        latent_size=64,
        heads=8,
    ),
    Family(
        "latent diffusion, semantic synthesis",
        (Signs("semantic", 6, 3, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0205,
        latent_size=64,
        heads=8,
    ),
    Family(
        "latent diffusion, unconditional (LSUN-churches)",
        (Signs(None, 4, 4, codebook=False),),
        beta_start=0.0015,
        beta_end=0.0155,
        latent_size=32,
        heads=8,
    ),
    Family(
        "latent diffusion, unconditional (CelebA-HQ, FFHQ, LSUN-bedrooms)",
        (Signs(None, 3, 3, codebook=True),),
        beta_start=0.0015,
        beta_end=0.0195,
        latent_size=64,
        head_width=32,
    ),
)


def family_of(signs: Signs) -> Family:
    """Raises UnsupportedStructure for shapes that no published family has."""
    for family in FAMILIES:
        if signs in family.signs:
            return family
    conditioner = signs.conditioner or "none that is known"
    raise UnsupportedStructure(
        f"no published model is like this: {signs.in_channels} channels into its UNet and {signs.out_channels} out, "
        f"conditioner: {conditioner}, autoencoder {'with' if signs.codebook else 'without'} a codebook. "
        "A diffusers folder of it says its structure itself"
    )
