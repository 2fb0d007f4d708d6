"""Configs as published: every option of them is understood, and what diffusers corrects in them is corrected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.unet import UNet
from models.weights_io.folder import save_folder, unet_config
from models.weights_io.tensors import WeightsError
from tests.models.small import diffusers

SD_BLOCKS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
EARLY = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    **SD_BLOCKS,
}
SD1 = {**EARLY, "attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 4}
SD2 = {
    **EARLY,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "in_channels": 4,
    "use_linear_projection": True,
}
OFF_SINCE_0_17 = {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "use_linear_projection": False,
}
# The config.json of each repository's unet folder, from copies of them, with the side of the pictures of its training.
UNETS: dict[str, tuple[dict[str, Any], int]] = {
    "stable-diffusion-v1-5, first": ({**SD1, "_diffusers_version": "0.6.0", "sample_size": 32}, 512),
    "stable-diffusion-v1-5": ({**SD1, **OFF_SINCE_0_17, "_diffusers_version": "0.17.0.dev0", "sample_size": 64}, 512),
    "stable-diffusion-inpainting": (
        {**SD1, "_diffusers_version": "0.6.0.dev0", "in_channels": 9, "sample_size": 32},
        512,
    ),
    "stable-diffusion-2-inpainting": (
        {**SD2, "_diffusers_version": "0.8.0", "in_channels": 9, "sample_size": 32},
        512,
    ),
    "stable-diffusion-2-1-base": (
        {
            **SD2,
            "_diffusers_version": "0.10.0.dev0",
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 64,
        },
        512,
    ),
}


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """By names and shapes."""
    found, wanted = ({key: value.shape for key, value in one.state_dict().items()} for one in (ours, theirs))
    assert found == wanted


@pytest.mark.parametrize(("data", "side"), UNETS.values(), ids=UNETS)
def test_unets(data: dict[str, Any], side: int) -> None:
    config = unet_config(data, stable=True)
    assert config.size == (side // 8, side // 8)
    with torch.device("meta"):
        same_weights(UNet(config), diffusers.UNet2DConditionModel.from_config(data))


def test_other_models_are_as_small_as_they_say() -> None:
    """LDM's text-to-image model was trained at 32, whatever diffusers wrote it; so may any be that later ones wrote."""
    data, _ = UNETS["stable-diffusion-v1-5, first"]
    assert unet_config(data, stable=False).size == (32, 32)
    assert unet_config({**data, "_diffusers_version": "0.10.0"}, stable=True).size == (32, 32)


CELEBAHQ = {
    "unet": {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 64,
        "time_embedding_type": "positional",
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.0.4",
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "trained_betas": None,
    },
    "vqvae": {
        "_class_name": "VQModel",
        "_diffusers_version": "0.1.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "in_channels": 3,
        "latent_channels": 3,
        "layers_per_block": 2,
        "num_vq_embeddings": 8192,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
}


def test_ldm_celebahq_256() -> None:
    """Its sampler's file, older than most settings, is read as diffusers reads it."""
    with torch.device("meta"):
        unet, first_stage = UNetConfig.from_dict(CELEBAHQ["unet"]), AutoencoderConfig.from_dict(CELEBAHQ["vqvae"])
        same_weights(UNet(unet), diffusers.UNet2DModel.from_config(CELEBAHQ["unet"]))
        same_weights(Autoencoder(first_stage), diffusers.VQModel.from_config(CELEBAHQ["vqvae"]))
    config, theirs = ScheduleConfig.from_dict(CELEBAHQ["scheduler"]), diffusers.DDIMScheduler
    wanted = theirs.from_config(CELEBAHQ["scheduler"]).config
    for name in ("steps_offset", "set_alpha_to_one", "beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert getattr(config, name) == wanted[name], name


SCHEDULE = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
SCHEDULES: dict[str, dict[str, Any]] = {
    "PNDM of stable-diffusion-v1-4": {"_class_name": "PNDMScheduler"},
    "PNDM of stable-diffusion-v1-5": {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "thresholding": False,
    },
    "DDIM of stable-diffusion-inpainting": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "Euler of a model of SDXL's kind": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "linspace",
    },
}


@pytest.mark.parametrize("data", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(data: dict[str, Any]) -> None:
    said = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    config = ScheduleConfig.from_dict({**SCHEDULE, **said, **data})
    assert config == ScheduleConfig(timestep_spacing=data.get("timestep_spacing"))


def rewrite(path: Path, **changes: Any) -> None:
    """A value of None takes the field out."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers says what it corrects
@pytest.mark.parametrize("said", [None, 0])
def test_stable_diffusion_skips_the_first_timestep_whatever_its_file_says(
    said: int | None, text_model: LatentDiffusion, upscaler: LatentDiffusion, tmp_path: Path
) -> None:
    """As diffusers' pipelines for it; that of the upscaler does not."""
    for name, model, expected in (("text", text_model, 1), ("upscaler", upscaler, 0)):
        save_folder(model, tmp_path / name)
        rewrite(tmp_path / name / "scheduler" / "scheduler_config.json", steps_offset=said)
        assert LatentDiffusion.load(tmp_path / name).schedule.config.steps_offset == expected
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        assert pipeline.scheduler.config.steps_offset == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers says what it corrects
def test_an_upscaler_whose_file_has_no_scale(
    text_model: LatentDiffusion, upscaler: LatentDiffusion, tmp_path: Path
) -> None:
    """It was published before diffusers had that field, and had the scale in the pipeline."""
    for name, model, expected in (("text", text_model, 0.18215), ("upscaler", upscaler, 0.08333)):
        save_folder(model, tmp_path / name)
        rewrite(tmp_path / name / "vae" / "config.json", scaling_factor=None)
        assert LatentDiffusion.load(tmp_path / name).autoencoder.config.scaling_factor == expected
        assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / name).vae.config.scaling_factor == expected


def test_what_pictures_are_not_made_with_does_not_matter(text_model: LatentDiffusion, tmp_path: Path) -> None:
    save_folder(text_model, tmp_path, dtype=torch.float32)
    rewrite(
        tmp_path / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=[None, None],
        watermarker=["stable_diffusion", "Watermarker"],
        requires_safety_checker=True,
    )
    assert torch.equal(LatentDiffusion.load(tmp_path).unet.conv_out.weight, text_model.unet.conv_out.weight)


def test_folders_of_other_pipelines(text_model: LatentDiffusion, tmp_path: Path) -> None:
    """Whose parts for PyTorch may lie beside what their index names."""
    save_folder(text_model, tmp_path)
    rewrite(tmp_path / "model_index.json", vae=None, vae_decoder=["diffusers", "OnnxRuntimeModel"])
    with pytest.raises(WeightsError, match=r"model_index.json names no vae; expected"):
        LatentDiffusion.load(tmp_path)
    rewrite(tmp_path / "model_index.json", unet=None, scheduler=[None, None])
    with pytest.raises(WeightsError, match="names no scheduler and no unet and no vae"):
        LatentDiffusion.load(tmp_path)
