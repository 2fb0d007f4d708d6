"""The structure of the UNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.config.fields import UnsupportedStructure, check_groups, check_sizes, known_fields

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The text-conditioned UNet of LDM (Rombach et al. 2022, section 3.3), diffusers' `UNet2DConditionModel`.

    `attention_head_dim` is the *number of heads* (one int, or one per level): diffusers' historic name for it.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    num_class_embeds: int | None = None

    _OFF: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "upcast_attention": (False, None),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "dropout": (0, 0.0),
        "class_embeddings_concat": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1, 1.0),
        **dict.fromkeys(
            (
                "addition_embed_type",
                "addition_embed_type_num_heads",
                "addition_time_embed_dim",
                "class_embed_type",
                "cross_attention_norm",
                "encoder_hid_dim",
                "encoder_hid_dim_type",
                "mid_block_only_cross_attention",
                "num_attention_heads",
                "projection_class_embeddings_input_dim",
                "reverse_transformer_layers_per_block",
                "time_cond_proj_dim",
                "time_embedding_act_fn",
                "time_embedding_dim",
                "timestep_post_act",
            ),
            (None,),
        ),
        "addition_embed_type_num_heads": (64, None),
    }

    def __post_init__(self) -> None:
        check_sizes(self, "in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups")
        check_sizes(self, "transformer_layers_per_block")
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"block_out_channels has {levels} levels; down_block_types and up_block_types must have as many, "
                f"not {len(self.down_block_types)} and {len(self.up_block_types)}"
            )
        unknown = [t for t in self.down_block_types if t not in DOWN_BLOCKS]
        unknown += [t for t in self.up_block_types if t not in UP_BLOCKS]
        if unknown:
            raise UnsupportedStructure(f"UNet blocks {unknown} are not supported; expected {DOWN_BLOCKS + UP_BLOCKS}")
        if len(self.heads) != levels:
            raise ValueError(
                f"attention_head_dim has {len(self.heads)} entries; expected one, or one per level ({levels})"
            )
        check_groups(self.block_out_channels, self.norm_num_groups)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads:
                raise ValueError(f"{channels} channels cannot be split into {heads} attention heads")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads, one entry per level."""
        if isinstance(self.attention_head_dim, int):
            return (self.attention_head_dim,) * len(self.block_out_channels)
        return self.attention_head_dim

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**known_fields(cls, data, cls._OFF))

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "UNet2DConditionModel", **dataclasses.asdict(self)}
