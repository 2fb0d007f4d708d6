"""The structure of the autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from models.config.fields import check_groups, check_sizes, known_fields


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """KL-regularised autoencoder of LDM (appendix G), diffusers' `AutoencoderKL`; f = 2^(levels-1)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True

    _OFF: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "force_upcast": (True, False),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    }

    # What diffusers takes for a field that its file leaves out, where the paper's f=8 autoencoder has more.
    _ABSENT: ClassVar[Mapping[str, Any]] = {"block_out_channels": [64], "layers_per_block": 1}

    def __post_init__(self) -> None:
        check_sizes(self, "in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
        check_groups(self.block_out_channels, self.norm_num_groups)

    @property
    def downsampling_factor(self) -> int:
        """f = H / h of the paper."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        data = {**cls._ABSENT, **data}
        levels = len(data["block_out_channels"])
        off = {
            **cls._OFF,
            "down_block_types": (["DownEncoderBlock2D"] * levels,),
            "up_block_types": (["UpDecoderBlock2D"] * levels,),
        }
        return cls(**known_fields(cls, data, off))

    def to_dict(self) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **dataclasses.asdict(self),
        }
