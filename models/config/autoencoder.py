"""The structure of the autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from models.config.fields import MOST_LAYERS, UnsupportedStructure, check_groups, check_sizes, known_fields, strings

_DOWN: Final = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_UP: Final = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""Names of the blocks without and with attention."""

_OFF: Final[Mapping[str, tuple[Any, ...]]] = {"act_fn": ("silu", "swish")}
_KL_OFF: Final = {**_OFF, "latents_mean": (None,), "latents_std": (None,), "shift_factor": (None,)}
_VQ_OFF: Final = {**_OFF, "norm_type": ("group",), "lookup_from_codebook": (False,)}

# What diffusers takes for fields that a file leaves out, where the paper's f=8 autoencoder has another.
_KL_ABSENT: Final = {"block_out_channels": [64], "layers_per_block": 1}
_VQ_ABSENT: Final = {**_KL_ABSENT, "latent_channels": 3, "num_vq_embeddings": 256, "force_upcast": False}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoders of LDM (appendix G), with f = 2^(levels-1).

    KL-regularised (diffusers' `AutoencoderKL`), or with a codebook of `codebook_size` vectors (`VQModel`), whose
    latents are not scaled. `attention_levels` counts the levels with attention after every residual block from the
    finest, 0. `force_upcast`: activations may leave the range of fp16.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 512
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    attention_levels: tuple[int, ...] = ()
    codebook_size: int | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "in_channels", "out_channels", "latent_channels", "norm_num_groups")
        check_sizes(self, "layers_per_block", most=MOST_LAYERS)
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor={self.scaling_factor}: expected more than 0")
        check_groups(self.block_out_channels, self.norm_num_groups)
        outside = [level for level in self.attention_levels if not 0 <= level < len(self.block_out_channels)]
        if outside:
            raise ValueError(f"attention_levels {outside}: expected 0 to {len(self.block_out_channels) - 1}")
        if self.codebook_size is not None:
            check_sizes(self, "codebook_size")
            if self.scaling_factor != 1 or not (self.use_quant_conv and self.use_post_quant_conv):
                raise ValueError("an autoencoder with a codebook has scaling_factor=1 and both of its 1x1 convolutions")

    @property
    def downsampling_factor(self) -> int:
        """f = H / h of the paper."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises UnsupportedStructure for what these modules do not implement."""
        name = data.get("_class_name", "AutoencoderKL")
        if name not in ("AutoencoderKL", "VQModel"):
            raise UnsupportedStructure(f"an autoencoder of class {name!r}; expected AutoencoderKL or VQModel")
        vq = name == "VQModel"
        data = {**(_VQ_ABSENT if vq else _KL_ABSENT), **data}
        own = _take_codebook(data) if vq else {}
        attention: dict[str, Any] = {
            name: data.pop(name) for name in ("down_block_types", "up_block_types") if name in data
        }
        without = ("attention_levels", "codebook_size", *(("use_quant_conv", "use_post_quant_conv") if vq else ()))
        known = known_fields(cls, data, _VQ_OFF if vq else _KL_OFF, without=without)
        own["attention_levels"] = _attention_levels(attention, len(known["block_out_channels"]))
        return cls(**{**known, **own})

    def to_dict(self) -> dict[str, Any]:
        levels = range(len(self.block_out_channels))
        data = {
            "_class_name": "AutoencoderKL" if self.codebook_size is None else "VQModel",
            "down_block_types": [_DOWN[level in self.attention_levels] for level in levels],
            "up_block_types": [_UP[level in self.attention_levels] for level in reversed(levels)],
            **dataclasses.asdict(self),
        }
        del data["attention_levels"]
        codebook_size = data.pop("codebook_size")
        if codebook_size is not None:
            del data["use_quant_conv"], data["use_post_quant_conv"]
            data |= {"num_vq_embeddings": codebook_size, "vq_embed_dim": self.latent_channels}
        return data


def _take_codebook(data: dict[str, Any]) -> dict[str, Any]:
    """What a `VQModel` says of its codebook. Its `scaling_factor` is a default that nothing ever used."""
    if data.pop("vq_embed_dim", None) not in (None, data["latent_channels"]):
        raise UnsupportedStructure(f"vq_embed_dim: expected None or latent_channels={data['latent_channels']}")
    data.pop("scaling_factor", None)
    size = data.pop("num_vq_embeddings")
    if type(size) is not int:
        raise UnsupportedStructure(f"num_vq_embeddings={size!r}: expected the number of codes")
    return {"codebook_size": size, "scaling_factor": 1.0}


def _attention_levels(data: Mapping[str, Any], levels: int) -> tuple[int, ...]:
    down = strings({"down_block_types": [_DOWN[0]] * levels, **data}, "down_block_types")
    up = strings({"up_block_types": [_UP[0]] * levels, **data}, "up_block_types")
    found = _with_attention(down, _DOWN)
    if len(down) != levels or found is None or found != _with_attention(up[::-1], _UP) or len(up) != levels:
        raise UnsupportedStructure(
            f"down_block_types={down}, up_block_types={up}: expected one of {_DOWN} and of {_UP} per level "
            f"({levels}), with attention at the same levels"
        )
    return found


def _with_attention(blocks: Sequence[str], names: tuple[str, str]) -> tuple[int, ...] | None:
    if not set(blocks) <= set(names):
        return None
    return tuple(level for level, block in enumerate(blocks) if block == names[1])
