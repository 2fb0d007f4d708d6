"""The diffusers folder: `model_index.json` and one subfolder per part, weights in safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS = "diffusion_pytorch_model.safetensors"
Module = TypeVar("Module", bound=nn.Module)


class WeightsError(ValueError):
    """A folder or file that does not hold the model it should; the message lists what is wrong with it."""


def load_folder(folder: Path) -> LatentDiffusion:
    """Raises WeightsError for a folder that is no model, a missing or broken file, missing, unexpected or misshapen
    keys; UnsupportedStructure for a structure that `models` does not implement."""
    read_json(folder / "model_index.json")
    unet = _load_part(folder / "unet", lambda config: UNet(UNetConfig.from_dict(config)))
    autoencoder = _load_part(folder / "vae", lambda config: Autoencoder(AutoencoderConfig.from_dict(config)))
    schedule = _load_schedule(folder / "scheduler")
    low_res = folder / "low_res_scheduler"
    low_res_schedule = _load_schedule(low_res) if low_res.is_dir() else None
    try:
        text_encoder = TextEncoder.load(folder)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder}: text encoder or tokenizer cannot be read: {error}") from error
    return LatentDiffusion(unet, autoencoder, text_encoder, schedule, low_res_schedule).eval().requires_grad_(False)


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing: a diffusers model folder has it") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def _load_schedule(folder: Path) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig.from_dict(read_json(folder / "scheduler_config.json")))


def _load_part(folder: Path, build: Callable[[dict[str, Any]], Module]) -> Module:
    """Build on the meta device and assign the file's tensors, so that memory holds the weights once."""
    config = read_json(folder / "config.json")
    with torch.device("meta"):
        part = build(config)
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from error
    _check_keys(path, part, weights)
    part.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=True)
    return part


def _check_keys(path: Path, part: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    expected = {key: tensor.shape for key, tensor in part.state_dict().items()}
    problems = [f"missing {key}" for key in expected.keys() - weights.keys()]
    problems += [f"unexpected {key}" for key in weights.keys() - expected.keys()]
    problems += [
        f"{key} is {list(weights[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in weights and weights[key].shape != shape
    ]
    if problems:
        raise WeightsError(f"{path} does not fit its config.json: " + "; ".join(sorted(problems)))


def save_folder(model: LatentDiffusion, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write what `load_folder` and diffusers read; an upscaler as StableDiffusionUpscalePipeline, else by its channels."""
    _save_part(model.unet, model.unet.config.to_dict(), folder / "unet", dtype)
    _save_part(model.autoencoder, model.autoencoder.config.to_dict(), folder / "vae", dtype)
    _write_json(folder / "scheduler" / "scheduler_config.json", model.schedule.config.to_dict())
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if model.low_res_schedule is not None:
        config = {**model.low_res_schedule.config.to_dict(), "_class_name": "DDPMScheduler"}
        for name in ("set_alpha_to_one",):
            config.pop(name)
        _write_json(folder / "low_res_scheduler" / "scheduler_config.json", config)
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
        pipeline = "StableDiffusionUpscalePipeline"
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        pipeline = "StableDiffusionInpaintPipeline" if model.inpaints else "StableDiffusionPipeline"
    _write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
    model.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
    transformer = model.text_encoder.transformer
    kept = transformer.dtype
    transformer.to(dtype).save_pretrained(folder / "text_encoder")
    transformer.to(kept)


def _save_part(part: nn.Module, config: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    _write_json(folder / "config.json", config)
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in part.state_dict().items()}, folder / WEIGHTS)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
