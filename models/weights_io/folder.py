"""The diffusers folder: `model_index.json` and one subfolder per part, weights in safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet
from models.weights_io.tensors import assign, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

WEIGHTS = "diffusion_pytorch_model.safetensors"
Module = TypeVar("Module", bound=nn.Module)


class Parts(NamedTuple):
    """What `LatentDiffusion` is assembled from, in the order of its arguments."""

    unet: UNet
    autoencoder: Autoencoder
    conditioner: TextEncoder
    schedule: NoiseSchedule
    low_res_schedule: NoiseSchedule | None


def load_parts(folder: Path) -> Parts:
    """The parts in fp32 on the CPU.

    Raises WeightsError for a folder that is no model, a missing or broken file, missing, unexpected or misshapen keys;
    UnsupportedStructure for a structure that `models` does not implement.
    """
    read_json(folder / "model_index.json")
    low_res = folder / "low_res_scheduler"
    return Parts(
        unet=_load_part(folder / "unet", lambda config: UNet(UNetConfig.from_dict(config))),
        autoencoder=_load_part(folder / "vae", lambda config: Autoencoder(AutoencoderConfig.from_dict(config))),
        conditioner=TextEncoder.load(folder),
        schedule=_load_schedule(folder / "scheduler"),
        low_res_schedule=_load_schedule(low_res) if low_res.is_dir() else None,
    )


def _load_schedule(folder: Path) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig.from_dict(read_json(folder / "scheduler_config.json")))


def _load_part(folder: Path, build: Callable[[dict[str, Any]], Module]) -> Module:
    """Build on the meta device and assign the file's tensors, so that memory holds the weights once."""
    config = read_json(folder / "config.json")
    with torch.device("meta"):
        part = build(config)
    assign(part, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return part


def save_folder(model: LatentDiffusion, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write what `LatentDiffusion.load` and diffusers read.

    An upscaler becomes a StableDiffusionUpscalePipeline; other models are what the channels of their UNet say.
    """
    for name, part in (("unet", model.unet), ("vae", model.autoencoder)):
        write_json(folder / name / "config.json", part.config.to_dict())
        write_tensors(folder / name / WEIGHTS, part.state_dict(), dtype)
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
