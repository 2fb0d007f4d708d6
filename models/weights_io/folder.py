"""The diffusers folder: `model_index.json` and one subfolder per part, weights in safetensors."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn

from models.autoencoder import Autoencoder
from models.bert import BertEncoder
from models.class_label import ClassEncoder
from models.conditioning import Conditioner
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.layout import LayoutEncoder
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.text_pair import EMPTY_IS_ZERO, TextPairEncoder
from models.unet import UNet
from models.weights_io.configs import read_config
from models.weights_io.files import Reading
from models.weights_io.tensors import LazyTensor, WeightsError, assign, read_json, write_json, write_tensors

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

STEM: Final = "diffusion_pytorch_model"
_Kind = type[TextPairEncoder] | type[TextEncoder] | type[BertEncoder] | type[ClassEncoder] | type[LayoutEncoder]
_CONDITIONERS: Final[Mapping[str, _Kind]] = {
    "text_encoder_2": TextPairEncoder,  # before the first of the pair
    "text_encoder": TextEncoder,
    "bert": BertEncoder,
    "class_encoder": ClassEncoder,
    "layout_encoder": LayoutEncoder,
}
"""By the folder of their weights."""
SEMANTIC: Final = "semantic"

# What diffusers' pipelines of Stable Diffusion have whatever their folders' files say, or where these say nothing.
_STEPS_OFFSET: Final = 1
_UPSCALER_SCALE: Final = 0.08333
_SIDE: Final = 64


class Parts(NamedTuple):
    """What `LatentDiffusion` is assembled from, in the order of its arguments."""

    unet: UNet
    autoencoder: Autoencoder
    conditioner: Conditioner | None
    schedule: NoiseSchedule
    low_res_schedule: NoiseSchedule | None
    semantic: nn.Conv2d | None


def load_folder(folder: Path, reading: Reading) -> Parts:
    """Raises as `load_parts`. What `model_index.json` does not name, or calls null, is not there."""
    index = read_json(folder / "model_index.json")
    parts = {name for name, what in index.items() if isinstance(what, list) and what and what[0] is not None}
    first_stage = "vqvae" if "vqvae" in parts else "vae"
    if missing := {"unet", first_stage, "scheduler"} - parts:
        raise WeightsError(
            f"{folder / 'model_index.json'} names no {' and no '.join(sorted(missing))}; expected a pipeline of latent "
            "diffusion with a UNet, in PyTorch"
        )
    conditioners = [kind for name, kind in _CONDITIONERS.items() if name in parts]
    upscaler = "low_res_scheduler" in parts
    stable = conditioners[:1] == [TextEncoder] and not upscaler
    return Parts(
        unet=_load_unet(folder / "unet", reading, stable=stable),
        autoencoder=_load_autoencoder(folder / first_stage, reading, upscaler=upscaler),
        conditioner=conditioners[0].load(folder, reading) if conditioners else None,
        schedule=_load_schedule(folder / "scheduler", {"steps_offset": _STEPS_OFFSET} if stable else {}),
        low_res_schedule=_load_schedule(folder / "low_res_scheduler") if upscaler else None,
        semantic=_load_semantic(folder / SEMANTIC, reading) if SEMANTIC in parts else None,
    )


def _load_schedule(folder: Path, insisted: Mapping[str, Any] = MappingProxyType({})) -> NoiseSchedule:
    path = folder / "scheduler_config.json"
    return NoiseSchedule(read_config(path, lambda data: ScheduleConfig.from_dict({**data, **insisted})))


def unet_config(data: Mapping[str, Any], *, stable: bool) -> UNetConfig:
    """Of a config.json, of Stable Diffusion if `stable`: its files gave the wrong size before diffusers 0.9."""
    config = UNetConfig.from_dict(data)
    version = re.match(r"0\.(\d+)\.", str(data.get("_diffusers_version")))
    if stable and version and int(version[1]) < 9 and min(config.size) < _SIDE:
        return dataclasses.replace(config, sample_size=_SIDE)
    return config


def _load_unet(folder: Path, reading: Reading, *, stable: bool) -> UNet:
    config = read_config(folder / "config.json", functools.partial(unet_config, stable=stable))
    with torch.device("meta"):
        unet = UNet(config)
    tensors, path = reading.weights(folder, STEM)
    assign(unet, with_present_names(tensors), path, reading.dtype)
    return unet


def _load_autoencoder(folder: Path, reading: Reading, *, upscaler: bool) -> Autoencoder:
    absent = {"scaling_factor": _UPSCALER_SCALE} if upscaler else {}
    config = read_config(folder / "config.json", lambda data: AutoencoderConfig.from_dict({**absent, **data}))
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    tensors, path = reading.weights(folder, STEM)
    assign(autoencoder, with_linear_attention(with_present_names(tensors)), path, reading.dtype)
    return autoencoder


def _load_semantic(folder: Path, reading: Reading) -> nn.Conv2d:
    config = read_json(folder / "config.json")
    tensors, path = reading.weights(folder, STEM)
    try:
        with torch.device("meta"):
            convolution = nn.Conv2d(int(config["classes"]), int(config["channels"]), 1, bias=bool(config["bias"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder / 'config.json'}: expected numbers of classes and channels, and bias") from error
    assign(convolution, tensors, path, reading.dtype)
    return convolution


_OLD_NAMES: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def with_present_names(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Attention without text had other names before diffusers 0.13: attentions.0.query is now attentions.0.to_q."""

    def renamed(key: str) -> str:
        stem, _, leaf = key.rpartition(".")
        parent, _, name = stem.rpartition(".")
        return f"{parent}.{_OLD_NAMES[name]}.{leaf}" if name in _OLD_NAMES and ".attentions." in key else key

    return {renamed(key): tensor for key, tensor in tensors.items()}


def with_linear_attention(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """An autoencoder's attention may be stored as 1x1 convolutions, [o, i, 1, 1] -> [o, i]."""

    def flat(key: str, tensor: LazyTensor) -> LazyTensor:
        if ".attentions." not in key or tensor.shape[2:] != (1, 1):
            return tensor
        return tensor.changed(tensor.shape[:2], lambda weight: weight.flatten(1))

    return {key: flat(key, tensor) for key, tensor in tensors.items()}


def save_folder(model: LatentDiffusion, folder: Path, *, dtype: torch.dtype | None = torch.float16) -> None:
    """Write what `LatentDiffusion.load` reads, and diffusers where it has a pipeline for such a model.

    `dtype` None keeps each tensor's own.
    """
    pipeline = _pipeline(model)
    first_stage = "vqvae" if pipeline.startswith("LDM") else "vae"
    for name, part in (("unet", model.unet), (first_stage, model.autoencoder)):
        write_json(folder / name / "config.json", part.config.to_dict())
        write_tensors(folder / name / f"{STEM}.safetensors", part.state_dict(), dtype)
    if model.conditioner is not None:
        model.conditioner.save(folder, dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", model.schedule.config.to_dict())
    if model.low_res_schedule is not None:
        config = model.low_res_schedule.config.to_dict()
        del config["set_alpha_to_one"]  # DDIM's alone
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", {**config, "_class_name": "DDPMScheduler"})
    if model.semantic is not None:
        sizes = {"classes": model.semantic.in_channels, "channels": model.semantic.out_channels}
        write_json(folder / SEMANTIC / "config.json", {**sizes, "bias": model.semantic.bias is not None})
        write_tensors(folder / SEMANTIC / f"{STEM}.safetensors", model.semantic.state_dict(), dtype)
    write_json(folder / "model_index.json", {"_class_name": pipeline, **_index(model, first_stage)})


def _pipeline(model: LatentDiffusion) -> str:
    """diffusers' pipeline for such a model, or a name of ours where it has none."""
    if isinstance(model.conditioner, TextEncoder | TextPairEncoder):
        if model.low_res_schedule is not None:
            return "StableDiffusionUpscalePipeline"
        xl = "XL" if isinstance(model.conditioner, TextPairEncoder) else ""
        return f"StableDiffusion{xl}{'Inpaint' if model.inpaints else ''}Pipeline"
    if isinstance(model.conditioner, BertEncoder):
        return "LDMTextToImagePipeline"
    if model.conditioning != "none" or model.inpaints:
        return f"Darkroom{'Inpaint' if model.inpaints else model.conditioning.title()}Pipeline"
    return "LDMSuperResolutionPipeline" if model.upscales else "LDMPipeline"


def _index(model: LatentDiffusion, first_stage: str) -> dict[str, Any]:
    """The class of each part, and what diffusers' pipelines of Stable Diffusion want to know besides."""
    index: dict[str, Any] = {
        "_diffusers_version": "0.38.0",  # whose layout this is; its inpainting pipeline does not load without
        "unet": ["diffusers", model.unet.config.to_dict()["_class_name"]],
        first_stage: ["diffusers", model.autoencoder.config.to_dict()["_class_name"]],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    match model.conditioner:
        case TextEncoder():
            index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        case TextPairEncoder(empty_is_zero=empty_is_zero):
            index |= {
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                EMPTY_IS_ZERO: empty_is_zero,
            }
        case BertEncoder():
            index |= {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
        case ClassEncoder() | LayoutEncoder() as encoder:
            name = next(name for name, kind in _CONDITIONERS.items() if isinstance(encoder, kind))
            index[name] = ["darkroom", type(encoder).__name__]
    if model.semantic is not None:
        index[SEMANTIC] = ["darkroom", "Conv2d"]
    if model.low_res_schedule is not None:
        low_res = {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": model.max_noise_level}
        return {**index, **low_res}
    if isinstance(model.conditioner, TextEncoder):
        absent = {"safety_checker": [None, None], "feature_extractor": [None, None]}
        return {**index, **absent, "requires_safety_checker": False}
    return index
