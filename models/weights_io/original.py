"""The parts of a model as they lie in a file of the original layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import nn
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.autoencoder import Autoencoder
from models.bert import BertConfig, BertEncoder, BertTransformer
from models.class_label import ClassConfig, ClassEncoder
from models.config import AutoencoderConfig, UNetConfig
from models.layout import LayoutConfig, LayoutEncoder
from models.text import TextEncoder, Tokenizer, clip_of_tensors, load_tokenizer
from models.text_pair import TextPairEncoder, Tokenizers
from models.unet import UNet
from models.weights_io import key_maps, recognise
from models.weights_io.families import ConditionerKind, Family
from models.weights_io.tensors import LazyTensor, WeightsError, assign

UNET: Final = "model.diffusion_model."
AUTOENCODER: Final = "first_stage_model."
CONDITIONER: Final = "cond_stage_model."
TRANSFORMER: Final = "cond_stage_model.transformer."
OPEN_CLIP: Final = "cond_stage_model.model."
PAIR: Final = "conditioner."
PAIR_CLIP: Final = "conditioner.embedders.0.transformer.text_model."
PAIR_OPEN_CLIP: Final = "conditioner.embedders.1.model."


class Target(NamedTuple):
    """What the tensors of `path` become: in memory as `dtype`, None as they are. `tokenizer` is a folder."""

    path: Path
    dtype: torch.dtype | None
    tokenizer: Path | None


class Part(NamedTuple):
    """Where a module's tensors lie in the file, and what makes it of them, named as its own."""

    sources: key_maps.Sources
    build: Callable[[dict[str, LazyTensor]], nn.Module]

    def of(self, tensors: Mapping[str, LazyTensor]) -> nn.Module:
        def picked(source: key_maps.Source) -> LazyTensor:
            tensor = tensors[source.key]
            return tensor if source.pick is None else tensor.changed(source.made, source.pick)

        return self.build({key: picked(source) for key, source in self.sources.items()})


def _on_meta(make: Callable[[], nn.Module]) -> tuple[nn.Module, key_maps.Shapes]:
    with torch.device("meta"):
        module = make()
    return module, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _assigned(module: nn.Module, target: Target, tensors: dict[str, LazyTensor]) -> nn.Module:
    assign(module, tensors, target.path, target.dtype)
    return module


def unet_part(config: UNetConfig, target: Target) -> Part:
    module, shapes = _on_meta(lambda: UNet(config))
    sources = key_maps.with_prefix(UNET, key_maps.unet_sources(config, shapes))
    return Part(sources, functools.partial(_assigned, module, target))


def autoencoder_part(config: AutoencoderConfig, target: Target) -> Part:
    module, shapes = _on_meta(lambda: Autoencoder(config))
    sources = key_maps.with_prefix(AUTOENCODER, key_maps.autoencoder_sources(config, shapes))
    return Part(sources, functools.partial(_assigned, module, target))


def conditioner_kind(shapes: recognise.Shapes, codebook: bool) -> ConditionerKind | None:
    if {f"{PAIR_CLIP}embeddings.token_embedding.weight", f"{PAIR_OPEN_CLIP}text_projection"} <= shapes.keys():
        return "clip_pair"
    if f"{OPEN_CLIP}token_embedding.weight" in shapes:
        return "open_clip"
    if any(f"{prefix}embeddings.token_embedding.weight" in shapes for prefix in _CLIP_PREFIXES):
        return "clip"
    if f"{TRANSFORMER}token_emb.weight" in shapes:
        return "layout" if codebook else "bert"
    if f"{CONDITIONER}embedding.weight" in shapes:
        return "class"
    return "semantic" if f"{CONDITIONER}channel_mapper.weight" in shapes else None


def conditioner_part(kind: ConditionerKind, family: Family, shapes: recognise.Shapes, target: Target) -> Part:
    """A Conditioner, or the convolution of a semantic map."""
    match kind:
        case "clip" | "open_clip":
            return _clip_part(kind == "open_clip", shapes, target)
        case "clip_pair":
            return _clip_pair_part(shapes, target)
        case "bert" | "layout":
            return _bert_part(kind == "layout", recognise.bert_config(recognise.below(TRANSFORMER, shapes)), target)
        case "class":
            classes, width = shapes[f"{CONDITIONER}embedding.weight"]
            config = ClassConfig(classes, width, classes - 1 if family.unconditional_class else None)
            sources = {"embedding.weight": key_maps.Source(f"{CONDITIONER}embedding.weight", (classes, width))}
            return Part(sources, lambda tensors: ClassEncoder.of_tensors(config, tensors, target.path, target.dtype))
        case "semantic":
            return _semantic_part(shapes[f"{CONDITIONER}channel_mapper.weight"], target)


def _semantic_part(shape: tuple[int, ...], target: Target) -> Part:
    module, _ = _on_meta(lambda: nn.Conv2d(shape[1], shape[0], 1, bias=False))
    sources = {"weight": key_maps.Source(f"{CONDITIONER}channel_mapper.weight", (*shape[:2], 1, 1))}
    return Part(sources, functools.partial(_assigned, module, target))


# Files written with transformers 5 lack the second half.
_CLIP_PREFIXES: Final = (f"{TRANSFORMER}text_model.", TRANSFORMER)


def _clip_part(open_clip: bool, shapes: recognise.Shapes, target: Target) -> Part:
    if open_clip:
        prefix, own = OPEN_CLIP, key_maps.open_clip_sources
        config = recognise.open_clip_config(recognise.below(prefix, shapes))
    else:
        prefix = next(one for one in _CLIP_PREFIXES if f"{one}embeddings.token_embedding.weight" in shapes)
        own = key_maps.clip_sources
        config = recognise.clip_config(recognise.below(prefix, shapes))
    _, wanted = _on_meta(lambda: CLIPTextModel(config))

    def build(tensors: dict[str, LazyTensor]) -> nn.Module:
        tokenizer = _clip_tokenizer(open_clip, config, target)
        return TextEncoder.of_tensors(tokenizer, config, tensors, target.path, target.dtype)

    return Part(key_maps.with_prefix(prefix, own(wanted)), build)


def _clip_tokenizer(open_clip: bool, config: CLIPTextConfig, target: Target) -> CLIPTokenizer:
    tokenizer = find_tokenizer(target, CLIPTokenizer, "vocab.json", "merges.txt")
    tokenizer.model_max_length = config.max_position_embeddings
    if open_clip and tokenizer.convert_tokens_to_ids("!") == 0:
        tokenizer.pad_token = "!"  # noqa: S105  # OpenCLIP pads with id 0, whatever it stands for
    return tokenizer


def _clip_pair_part(shapes: recognise.Shapes, target: Target) -> Part:
    first = recognise.clip_config(recognise.below(PAIR_CLIP, shapes))
    second = recognise.open_clip_config(recognise.below(PAIR_OPEN_CLIP, shapes), whole=True)
    _, wanted = _on_meta(lambda: CLIPTextModel(first))
    _, wanted_2 = _on_meta(lambda: CLIPTextModelWithProjection(second))
    sources = {
        "text_encoder": key_maps.with_prefix(PAIR_CLIP, key_maps.clip_sources(wanted)),
        "text_encoder_2": key_maps.with_prefix(PAIR_OPEN_CLIP, key_maps.open_clip_sources(wanted_2)),
    }

    def build(tensors: dict[str, LazyTensor]) -> nn.Module:
        own, own_2 = ({key: tensors[f"{part}.{key}"] for key in keys} for part, keys in sources.items())
        tokenizers = Tokenizers(_clip_tokenizer(False, first, target), _clip_tokenizer(True, second, target))
        return TextPairEncoder(
            tokenizers,
            clip_of_tensors(CLIPTextModel, first, own, target.path, target.dtype, tokenizers.first),
            clip_of_tensors(CLIPTextModelWithProjection, second, own_2, target.path, target.dtype, tokenizers.second),
        )

    return Part({f"{part}.{key}": source for part, keys in sources.items() for key, source in keys.items()}, build)


def _bert_part(layout: bool, config: BertConfig, target: Target) -> Part:
    _, wanted = _on_meta(lambda: BertTransformer(config))

    def build(tensors: dict[str, LazyTensor]) -> nn.Module:
        if layout:
            whole = LayoutConfig(max_objects=(config.max_position_embeddings - 2) // 3, transformer=config)
            return LayoutEncoder(whole, BertTransformer.of_tensors(config, tensors, target.path, target.dtype))
        tokenizer = find_tokenizer(target, BertTokenizer, "vocab.txt")
        return BertEncoder(tokenizer, BertTransformer.of_tensors(config, tensors, target.path, target.dtype))

    return Part(key_maps.with_prefix(TRANSFORMER, key_maps.bert_sources(wanted)), build)


def find_tokenizer(target: Target, kind: type[Tokenizer], *files: str) -> Tokenizer:
    """The file does not hold it: from the folder that was told, else from one beside the file."""
    near = target.path.parent if target.tokenizer is None else target.tokenizer
    for folder in (near / "tokenizer", near):
        if (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in files):
            return load_tokenizer(folder, kind, *files)
    raise WeightsError(
        f"{near} has no tokenizer for {target.path.name}, which does not hold one: put {' and '.join(files)} "
        f"(or tokenizer.json) into {near / 'tokenizer'}, or name their folder (--tokenizer)"
    )
