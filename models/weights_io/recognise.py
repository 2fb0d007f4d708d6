"""What the shapes in a file of the original layout tell of its model's structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from transformers import CLIPTextConfig

from models.bert import BertConfig
from models.config import AutoencoderConfig, UnsupportedStructure

Shapes = Mapping[str, tuple[int, ...]]

CLIP_WIDTH_OF_HEAD = 64  # of every published CLIP text encoder
BERT_HEADS = 8
GROUPS = 32  # of every norm over feature maps


class UNetStructure(NamedTuple):
    """`attention` per level, `middle` for the block in the middle: of what kind, if any. `depths` per level: how many
    transformer blocks. `only_cross` per level: whether what would be self-attention reads the context. `added`: the
    width of what is embedded beside the timestep."""

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    layers: int
    attention: tuple[Literal["text", "self"] | None, ...]
    middle: Literal["text", "self"] | None
    depths: tuple[int, ...]
    context: int | None
    linear: bool
    only_cross: tuple[bool, ...]
    updown: bool
    scale_shift: bool
    classes: int | None
    added: int | None


def below(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Those under `prefix`, without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def count(prefix: str, keys: Iterable[str]) -> int:
    """How many numbers follow `prefix`: the length of a list of modules."""
    numbers = {found[1] for key in keys if (found := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return len(numbers)


def unet_structure(shapes: Shapes) -> UNetStructure:
    """Of the keys below `model.diffusion_model.`. Raises UnsupportedStructure where they are not as expected."""
    try:
        return _unet_structure(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedStructure(
            f"the UNet's keys are not those of the original layout: {error} is missing"
        ) from error


def _unet_structure(shapes: Shapes) -> UNetStructure:
    outputs = count("output_blocks.", shapes)
    ends = [k for k in range(outputs) for name in ("1", "2") if _upsamples(f"output_blocks.{k}.{name}.", shapes)]
    per = min(ends, default=outputs - 1) + 1  # blocks of a level
    firsts = [f"input_blocks.{1 + per * level}." for level in range(outputs // per)]
    attention = tuple(_attention(f"{first}1.", shapes) for first in firsts)
    middle = _attention("middle_block.1.", shapes)
    places = [f"{first}1." for first in firsts] + ["middle_block.1."]
    depths = [count(f"{place}transformer_blocks.", shapes) for place in places]
    widths = tuple(shapes[f"{first}0.out_layers.3.weight"][0] for first in firsts)
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    projections = [shape for key, shape in shapes.items() if key.endswith(".proj_in.weight")]
    embedding = shapes[f"{firsts[0]}0.emb_layers.1.weight"]
    return UNetStructure(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        widths=widths,
        layers=per - 1,
        attention=attention,
        middle=middle,
        depths=tuple(depth or depths[-1] for depth in depths[:-1]),
        context=context,
        linear=any(len(shape) == 2 for shape in projections),
        only_cross=tuple(_reads_context(f"{first}1.", shapes) for first in firsts),
        updown=any(f"output_blocks.{k}.{n}.in_layers.0.weight" in shapes for k in ends for n in "12"),
        scale_shift=embedding[0] == 2 * widths[0],
        classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        added=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
    )


def _upsamples(place: str, shapes: Shapes) -> bool:
    return f"{place}conv.weight" in shapes or f"{place}in_layers.0.weight" in shapes


def _attention(place: str, shapes: Shapes) -> Literal["text", "self"] | None:
    if f"{place}transformer_blocks.0.attn2.to_k.weight" in shapes:
        return "text"
    return "self" if f"{place}qkv.weight" in shapes else None


def _reads_context(place: str, shapes: Shapes) -> bool:
    """Whether attn1 takes its keys from something of another width than its queries. (Where the context is as wide as
    the feature map this cannot be seen; the one model that has such levels, the x4 upscaler, has self-attention there.)
    """
    block = f"{place}transformer_blocks.0.attn1."
    if f"{block}to_k.weight" not in shapes:
        return False
    return shapes[f"{block}to_k.weight"][1] != shapes[f"{block}to_q.weight"][1]


def autoencoder_config(shapes: Shapes, scaling_factor: float, latent_size: int) -> AutoencoderConfig:
    """Of the keys below `first_stage_model.`; `latent_size` is the side of the latents in training."""
    try:
        return _autoencoder_config(shapes, scaling_factor, latent_size)
    except KeyError as error:
        raise UnsupportedStructure(
            f"the autoencoder's keys are not those of the original layout: {error} is missing"
        ) from error


def _autoencoder_config(shapes: Shapes, scaling_factor: float, latent_size: int) -> AutoencoderConfig:
    levels = count("encoder.down.", shapes)
    codebook = shapes.get("quantize.embedding.weight")
    latent_channels, before = shapes["post_quant_conv.weight"][1], shapes["post_quant_conv.weight"][0]
    if latent_channels != before or (codebook is not None and codebook[1] != latent_channels):
        raise UnsupportedStructure(
            f"an autoencoder whose latents have {latent_channels} channels and its decoder {before}; expected as many"
        )
    return AutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=latent_channels,
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)),
        layers_per_block=count("encoder.down.0.block.", shapes),
        norm_num_groups=GROUPS,
        sample_size=latent_size * 2 ** (levels - 1),
        scaling_factor=1.0 if codebook is not None else scaling_factor,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
        attention_levels=tuple(i for i in range(levels) if count(f"encoder.down.{i}.attn.", shapes)),
        codebook_size=None if codebook is None else codebook[0],
        force_upcast=codebook is None,
    )


def clip_config(shapes: Shapes) -> CLIPTextConfig:
    """Of the keys below `text_model.`: CLIP's own, as in SD 1."""
    tokens, layer = shapes["embeddings.token_embedding.weight"], "encoder.layers.0."
    return _clip(
        tokens,
        positions=shapes["embeddings.position_embedding.weight"][0],
        layers=count("encoder.layers.", shapes),
        inner=shapes[f"{layer}mlp.fc1.weight"][0],
        hidden_act="quick_gelu",
    )


def open_clip_config(shapes: Shapes, *, whole: bool = False) -> CLIPTextConfig:
    """Of the keys below `cond_stage_model.model.`, less the last layer: SD 2 reads what the one before it gives. SDXL
    needs the `whole` of it, with its projection."""
    return _clip(
        shapes["token_embedding.weight"],
        positions=shapes["positional_embedding"][0],
        layers=count("transformer.resblocks.", shapes) - (not whole),
        inner=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        hidden_act="gelu",
        projection=shapes["text_projection"][1] if whole else None,
    )


def _clip(
    tokens: tuple[int, ...],
    *,
    positions: int,
    layers: int,
    inner: int,
    hidden_act: str,
    projection: int | None = None,
) -> CLIPTextConfig:
    vocabulary, width = tokens
    special: dict[str, Any] = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // CLIP_WIDTH_OF_HEAD,
        max_position_embeddings=positions,
        hidden_act=hidden_act,
        projection_dim=projection or width,
        **special,
    )


def bert_config(shapes: Shapes) -> BertConfig:
    """Of the keys below `cond_stage_model.transformer.`."""
    vocabulary, width = shapes["token_emb.weight"]
    return BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=shapes["pos_emb.emb.weight"][0],
        encoder_layers=count("attn_layers.layers.", shapes) // 2,
        encoder_ffn_dim=shapes["attn_layers.layers.1.1.net.0.0.weight"][0],
        encoder_attention_heads=BERT_HEADS,
        head_dim=shapes["attn_layers.layers.0.1.to_q.weight"][0] // BERT_HEADS,
        d_model=width,
    )
