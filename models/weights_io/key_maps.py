"""Where each tensor of our modules lies in a file of the original layout (CompVis, Stability), per kind of module.

A map goes from the module's key to a `Source`. Most keys differ in names alone; an attention that the original keeps as
one tensor or as a convolution is cut or flattened when it is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from models.config import AutoencoderConfig, UNetConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""A module's keys with the shapes of their tensors."""


class Source(NamedTuple):
    """The file's tensor, of `shape`. `pick` makes the module's one of it, of the shape `made`; None: they are one."""

    key: str
    shape: Shape
    made: Shape = ()
    pick: Callable[[Tensor], Tensor] | None = None


Sources = dict[str, Source]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_sources(config: UNetConfig, shapes: Shapes) -> Sources:
    blocks = _unet_blocks(config)
    heads = {**{f"down_blocks.{level}": n for level, n in enumerate(config.heads)}, "mid_block": config.heads[-1]}
    heads |= {f"up_blocks.{index}": n for index, n in enumerate(reversed(config.heads))}
    sources = {}
    for key, shape in shapes.items():
        block, rest = _split(key, blocks)
        name, leaf = rest.rsplit(".", 1) if "." in rest else ("", rest)
        if re.fullmatch(r"to_[qkv]", name):
            at = next(n for part, n in heads.items() if key.startswith(f"{part}."))
            sources[key] = _of_qkv(f"{blocks[block]}.qkv.{leaf}", shape, "qkv".index(name[-1]), at)
        elif name == "to_out.0" and leaf == "weight":
            sources[key] = Source(f"{blocks[block]}.proj_out.weight", (*shape, 1), shape, _flat)
        else:
            name = {**_RESNET, "group_norm": "norm", "to_out.0": "proj_out"}.get(name, name)
            sources[key] = Source(".".join(filter(None, (blocks[block], name, leaf))), shape)
    return sources


def _split(key: str, blocks: Mapping[str, str]) -> tuple[str, str]:
    """The longest of `blocks` that the key lies in, and the rest of the key."""
    block = key
    while block not in blocks:
        if "." not in block:
            raise KeyError(f"{key} belongs to no block of the original layout")
        block = block.rpartition(".")[0]
    return block, key[len(block) + 1 :]


def _unet_blocks(config: UNetConfig) -> dict[str, str]:
    """Our modules and what the original calls them. Each level has `per` blocks there, down and up; a down level's
    last one is its downsampling, an up level's last one holds its upsampling after the attention if there is any."""
    levels, per = len(config.block_out_channels), config.layers_per_block + 1
    blocks = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for b in range(levels):
        for j in range(per - 1):
            blocks[f"down_blocks.{b}.resnets.{j}"] = f"input_blocks.{1 + per * b + j}.0"
            blocks[f"down_blocks.{b}.attentions.{j}"] = f"input_blocks.{1 + per * b + j}.1"
        blocks[f"down_blocks.{b}.downsamplers.0"] = f"input_blocks.{per * (b + 1)}.0"
        blocks[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{per * (b + 1)}.0.op"
        for j in range(per):
            blocks[f"up_blocks.{b}.resnets.{j}"] = f"output_blocks.{per * b + j}.0"
            blocks[f"up_blocks.{b}.attentions.{j}"] = f"output_blocks.{per * b + j}.1"
        after = 2 if "Attn" in config.up_block_types[b] else 1
        blocks[f"up_blocks.{b}.upsamplers.0"] = f"output_blocks.{per * b + per - 1}.{after}"
    return blocks


def _of_qkv(key: str, shape: Shape, which: int, heads: int) -> Source:
    """Rows of the original's one projection are ordered [head][q, k, v][width]; it is a convolution of width 1."""

    def pick(tensor: Tensor) -> Tensor:
        return tensor.reshape(heads, 3, -1)[:, which].reshape(shape)

    whole = (3 * shape[0], *shape[1:], *([1] if len(shape) == 2 else []))
    return Source(key, whole, shape, pick)


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def autoencoder_sources(config: AutoencoderConfig, shapes: Shapes) -> Sources:
    last = len(config.block_out_channels) - 1
    sources = {}
    for key, shape in shapes.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
        for ours, theirs in (
            ("down_blocks.", "down."),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            (".resnets.", ".block."),
            (".attentions.", ".attn."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            (".conv_norm_out.", ".norm_out."),
            (".conv_shortcut.", ".nin_shortcut."),
            (".group_norm.", ".norm."),
            (".to_out.0.", ".proj_out."),
        ):
            name = name.replace(ours, theirs)
        name = re.sub(r"\.to_([qkv])\.", r".\1.", name)
        if ".attentions." in key and len(shape) == 2:  # a linear layer here, a 1x1 convolution there
            sources[key] = Source(name, (*shape, 1, 1), shape, _flat)
        else:
            sources[key] = Source(name, shape)
    return sources


def bert_sources(shapes: Shapes) -> Sources:
    """LDM's transformer, whose layers alternate between attention and feed-forward."""
    parts = {
        "self_attn_layer_norm": (0, "0"),
        "self_attn.q_proj": (0, "1.to_q"),
        "self_attn.k_proj": (0, "1.to_k"),
        "self_attn.v_proj": (0, "1.to_v"),
        "self_attn.out_proj": (0, "1.to_out"),
        "final_layer_norm": (1, "0"),
        "fc1": (1, "1.net.0.0"),
        "fc2": (1, "1.net.2"),
    }
    whole = {"embed_tokens": "token_emb", "embed_positions": "pos_emb.emb", "layer_norm": "norm"}
    sources = {}
    for key, shape in shapes.items():
        name, leaf = key.rsplit(".", 1)
        if found := re.fullmatch(r"layers\.(\d+)\.(.*)", name):
            offset, part = parts[found[2]]
            name = f"attn_layers.layers.{2 * int(found[1]) + offset}.{part}"
        sources[key] = Source(f"{whole.get(name, name)}.{leaf}", shape)
    return sources


def clip_sources(shapes: Shapes) -> Sources:
    return {key: Source(key, shape) for key, shape in shapes.items()}


def open_clip_sources(shapes: Shapes) -> Sources:
    """OpenCLIP's text transformer, with or without its projection (a matrix that rows are multiplied with from the
    left); `in_proj` holds the rows of q, k and v one after another."""
    whole = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    sources = {}
    for key, shape in shapes.items():
        if key == "text_projection.weight":
            sources[key] = Source("text_projection", (shape[1], shape[0]), shape, Tensor.t)
            continue
        name = key.removeprefix("text_model.")
        name = whole.get(name, name).replace("encoder.layers.", "transformer.resblocks.")
        for ours, theirs in (
            (".layer_norm1.", ".ln_1."),
            (".layer_norm2.", ".ln_2."),
            (".mlp.fc1.", ".mlp.c_fc."),
            (".mlp.fc2.", ".mlp.c_proj."),
            (".self_attn.out_proj.", ".attn.out_proj."),
        ):
            name = name.replace(ours, theirs)
        if found := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(.*)", name):
            pick = functools.partial(_third, which="qkv".index(found[2]))
            sources[key] = Source(f"{found[1]}.attn.in_proj_{found[3]}", (3 * shape[0], *shape[1:]), shape, pick)
        else:
            sources[key] = Source(name, shape)
    return sources


def _third(tensor: Tensor, which: int) -> Tensor:
    return tensor.chunk(3)[which]


def with_prefix(prefix: str, sources: Sources) -> Sources:
    return {key: source._replace(key=prefix + source.key) for key, source in sources.items()}
