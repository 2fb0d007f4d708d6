"""The diffusers folder: `model_index.json` and one subfolder per part, weights in safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet
from models.weights_io.files import Reading
from models.weights_io.tensors import LazyTensor, assign, read_json, write_json, write_tensors

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

STEM = "diffusion_pytorch_model"


class Parts(NamedTuple):
    """What `LatentDiffusion` is assembled from, in the order of its arguments."""

    unet: UNet
    autoencoder: Autoencoder
    conditioner: TextEncoder
    schedule: NoiseSchedule
    low_res_schedule: NoiseSchedule | None


def load_parts(folder: Path, reading: Reading = Reading()) -> Parts:  # noqa: B008  # frozen
    """The parts on the CPU.

    Raises WeightsError for a folder that is no model, a missing or broken file, missing, unexpected or misshapen keys;
    UnsupportedStructure for a structure that `models` does not implement.
    """
    index = read_json(folder / "model_index.json")
    low_res = folder / "low_res_scheduler"
    return Parts(
        unet=_load_unet(folder / "unet", reading),
        autoencoder=_load_autoencoder(folder / ("vqvae" if "vqvae" in index else "vae"), reading),
        conditioner=TextEncoder.load(folder, reading),
        schedule=_load_schedule(folder / "scheduler"),
        low_res_schedule=_load_schedule(low_res) if low_res.is_dir() else None,
    )


def _load_schedule(folder: Path) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig.from_dict(read_json(folder / "scheduler_config.json")))


def _load_unet(folder: Path, reading: Reading) -> UNet:
    config = UNetConfig.from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        unet = UNet(config)
    tensors, path = reading.weights(folder, STEM)
    assign(unet, with_present_names(tensors), path, reading.dtype)
    return unet


def _load_autoencoder(folder: Path, reading: Reading) -> Autoencoder:
    config = AutoencoderConfig.from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    tensors, path = reading.weights(folder, STEM)
    assign(autoencoder, with_linear_attention(with_present_names(tensors)), path, reading.dtype)
    return autoencoder


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
    """Write what `LatentDiffusion.load` and diffusers read; `dtype` None keeps each tensor's own.

    An upscaler becomes a StableDiffusionUpscalePipeline; other models are what the channels of their UNet say.
    """
    for name, part in (("unet", model.unet), ("vae", model.autoencoder)):
        write_json(folder / name / "config.json", part.config.to_dict())
        write_tensors(folder / name / f"{STEM}.safetensors", part.state_dict(), dtype)
    if model.conditioner is not None:
        model.conditioner.save(folder, dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", model.schedule.config.to_dict())
    if model.low_res_schedule is not None:
        config = model.low_res_schedule.config.to_dict()
        del config["set_alpha_to_one"]  # DDIM's alone
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", {**config, "_class_name": "DDPMScheduler"})
    write_json(folder / "model_index.json", _index(model))


def _index(model: LatentDiffusion) -> dict[str, Any]:
    """`model_index.json`: the pipeline's class and that of each part."""
    index: dict[str, Any] = {
        "_diffusers_version": "0.38.0",  # whose layout this is; its inpainting pipeline does not load without
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if model.low_res_schedule is not None:
        low_res = {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": model.max_noise_level}
        return {"_class_name": "StableDiffusionUpscalePipeline", **index, **low_res}
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    pipeline = "StableDiffusionInpaintPipeline" if model.inpaints else "StableDiffusionPipeline"
    return {"_class_name": pipeline, **index, **absent}
