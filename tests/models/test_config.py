"""A structure is understood wholly or refused."""

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig, UnsupportedStructure
from models.schedule import NoiseSchedule
from models.unet import UNet
from tests.models.small import KL_F8, UNET, diffusers
from tests.models.structures import AUTOENCODERS, UNETS

CONFIGS = {**UNETS, **AUTOENCODERS, "schedule": ScheduleConfig(beta_end=0.02)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trip(config: UNetConfig | AutoencoderConfig | ScheduleConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def defaults(theirs: type[Any]) -> dict[str, Any]:
    """As JSON has them: lists, not tuples."""
    parameters = list(inspect.signature(theirs).parameters.values())
    values: dict[str, Any] = json.loads(json.dumps({p.name: p.default for p in parameters}))
    return values


def test_absent_fields_are_what_diffusers_takes_for_them() -> None:
    """But for sample_size, which no module reads, and the spacing, of which each of its samplers has one of its own."""
    size = {"sample_size": 64}
    ddim = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
    for name in ("UNet2DConditionModel", "UNet2DModel"):
        given = size | {"_class_name": name}
        assert UNetConfig.from_dict(given) == UNetConfig.from_dict(defaults(getattr(diffusers, name)) | given)
    for name in ("AutoencoderKL", "VQModel"):
        given = size | {"_class_name": name}
        expected = AutoencoderConfig.from_dict(defaults(getattr(diffusers, name)) | given)
        assert AutoencoderConfig.from_dict(given) == expected
    assert ScheduleConfig.from_dict(ddim) == ScheduleConfig.from_dict(defaults(diffusers.DDIMScheduler) | ddim)


PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1: written by an early diffusers, which said little": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "SD 2.1: every option of a later one": {
        **defaults(diffusers.UNet2DConditionModel),
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "x4-upscaler": {
        "_class_name": "UNet2DConditionModel",
        "_name_or_path": "unet",
        "block_out_channels": [256, 512, 512, 1024],
        "class_embed_type": None,
        "cross_attention_dim": 1024,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "in_channels": 7,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "sample_size": 128,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "use_linear_projection": True,
    },
    "CelebA: no text, fields of another class left out": {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["UNetResDownBlock2D"] + ["UNetResAttnDownBlock2D"] * 3,
        "in_channels": 3,
        "mid_block_scale_factor": 1,
        "num_train_timesteps": 1000,
        "out_channels": 3,
        "resnet_time_scale_shift": "default",
        "sample_size": [64, 64],
        "time_embedding_type": "positional",
        "up_block_types": ["UNetResAttnUpBlock2D"] * 3 + ["UNetResUpBlock2D"],
    },
}


@pytest.mark.parametrize("data", PUBLISHED.values(), ids=PUBLISHED)
def test_published_unets_are_built_as_diffusers_builds_them(data: dict[str, Any]) -> None:
    """Names and shapes of all weights."""
    config = UNetConfig.from_dict(data)
    with torch.device("meta"):
        ours = UNet(config)
        oracle = getattr(diffusers, data["_class_name"])(**{k: v for k, v in data.items() if not k.startswith("_")})
    assert shapes(ours) == shapes(oracle)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_the_middle_attends_to_itself_whatever_the_levels_do() -> None:
    """diffusers' middle block takes no `only_cross_attention`."""
    data = {**UNET.to_dict(), "only_cross_attention": True}
    with torch.device("meta"):
        ours, oracle = UNet(UNetConfig.from_dict(data)), diffusers.UNet2DConditionModel.from_config(data)
    assert shapes(ours) == shapes(oracle)


def test_heads_are_counted_by_the_class() -> None:
    """`attention_head_dim` is a number of heads in one class, the width of a head in the other."""
    heads = {name: UNetConfig.from_dict(data).heads for name, data in PUBLISHED.items()}
    assert list(heads.values()) == [(8, 8, 8, 8), (5, 10, 20, 20), (8, 8, 8, 8), (7, 14, 21, 28)]
    assert UNetConfig.from_dict({"_class_name": "UNet2DModel", "attention_head_dim": None}).heads == (1, 1, 1, 1)


def test_sizes_are_height_and_width() -> None:
    assert dataclasses.replace(UNET, sample_size=(6, 8)).size == (6, 8)
    assert dataclasses.replace(UNET, sample_size=8).size == (8, 8)


def test_latents_of_a_codebook_are_not_scaled_whatever_the_file_says() -> None:
    data = {"_class_name": "VQModel", "num_vq_embeddings": 8192, "vq_embed_dim": 3, "scaling_factor": 0.18215}
    config = AutoencoderConfig.from_dict(data)
    assert (config.codebook_size, config.scaling_factor, config.force_upcast) == (8192, 1.0, False)
    assert AutoencoderConfig.from_dict({}).force_upcast


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported; expected 'silu'"),
        ({"mid_block_type": None}, "expected 'UNetMidBlock2DCrossAttn'"),
        ({"dual_cross_attention": True}, "expected False"),
        ({"addition_embed_type": "image"}, "expected None or 'text_time'"),
        ({"invented": 1}, "invented=1 is not supported; expected its absence"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"num_attention_heads": 4}, "num_attention_heads=4 is not supported; expected None or 2"),
        ({"downsample_type": "resnet"}, "expected 'conv'"),
        ({"_class_name": "UNet3DConditionModel"}, "expected UNet2DConditionModel or UNet2DModel"),
        ({"resnet_time_scale_shift": "ada_group"}, "expected 'default' or 'scale_shift'"),
        ({"attention_head_dim": None}, "expected a number of heads"),
        ({"cross_attention_dim": None}, "expected the width of its context"),
        ({"layers_per_block": 0}, "expected one integer from 1"),
    ],
)
def test_unets_outside_the_code_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedStructure, match=message):
        UNetConfig.from_dict({**UNET.to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (8, 16, 16)}, "has 3 levels"),
        ({"norm_num_groups": 3}, "8 channels cannot be split into norm_num_groups=3"),
        ({"attention_head_dim": 3}, "16 channels cannot be split into a number of attention heads of 3"),
        ({"attention_head_dim": (2, 2, 2)}, "has 3 entries; expected one, or one per level"),
        ({"only_cross_attention": (True,)}, "only_cross_attention has 1 entries"),
        ({"transformer_layers_per_block": (1, 0)}, "expected 1 or more"),
        ({"add_attention": False}, "means nothing to a UNet2DConditionModel"),
    ],
)
def test_unets_of_bad_dimensions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**vars(UNET), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "with attention at the same levels"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "one of"),
        ({"_class_name": "AutoencoderTiny"}, "expected AutoencoderKL or VQModel"),
        ({"attention_levels": [0]}, "expected its absence"),
        ({"_class_name": "VQModel", "vq_embed_dim": 8}, "expected None or latent_channels=4"),
        ({"_class_name": "VQModel", "norm_type": "spatial"}, "expected 'group'"),
    ],
)
def test_autoencoders_outside_the_code_are_refused(changes: dict[str, Any], message: str) -> None:
    data = KL_F8.to_dict()
    if changes.get("_class_name") == "VQModel":
        del data["use_quant_conv"], data["use_post_quant_conv"]
    with pytest.raises(UnsupportedStructure, match=message):
        AutoencoderConfig.from_dict({**data, **changes})


def test_autoencoders_of_bad_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="4 channels cannot be split into norm_num_groups=3"):
        AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=3)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        AutoencoderConfig(block_out_channels=(32, 64), attention_levels=(2,))
    with pytest.raises(ValueError, match="has scaling_factor=1"):
        AutoencoderConfig(codebook_size=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "score"},
        {"timestep_spacing": "karras"},
        {"use_karras_sigmas": True},
        {"trained_betas": [0.1]},
    ],
)
def test_schedules_outside_the_code_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedStructure, match=next(iter(changes))):
        ScheduleConfig.from_dict({**ScheduleConfig().to_dict(), **changes})


NONSENSE: tuple[Any, ...] = (None, "x", -1, 0, 0.5, True, 10**20, float("nan"), [], ["a"], [[1]], {})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nonsense_is_refused_or_meant(config: UNetConfig | AutoencoderConfig | ScheduleConfig) -> None:
    """Whatever a file has for a field, it is refused with a ValueError or makes sense."""
    data = config.to_dict()
    for name in data:
        for value in NONSENSE:
            try:
                understood = type(config).from_dict({**data, name: value})
            except ValueError:
                continue
            if isinstance(understood, ScheduleConfig):
                assert NoiseSchedule(understood).alphas_cumprod.isfinite().all(), (name, value)
                continue
            with torch.device("meta"):
                UNet(understood) if isinstance(understood, UNetConfig) else Autoencoder(understood)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (UNET, {"layers_per_block": 10**9}, "layers_per_block=1000000000; expected one integer from 1 to 256"),
        (UNET, {"block_out_channels": [8, 2**40]}, "block_out_channels of 1099511627776; expected 1 to"),
        (UNET, {"block_out_channels": "ab"}, "block_out_channels='ab'; expected tuple"),
        (UNET, {"sample_size": [8, 8, 8]}, "expected one side, or height and width"),
        (UNET, {"up_block_types": [1, 2]}, "expected a list of strings"),
        (UNET, {"norm_eps": "1e-5"}, "norm_eps='1e-5'; expected float"),
        (KL_F8, {"scaling_factor": 0}, "scaling_factor=0: expected more than 0"),
        (KL_F8, {"in_channels": True}, "in_channels=True; expected int"),
        (ScheduleConfig(), {"beta_end": 2}, "expected to rise between 0 and 1"),
        (ScheduleConfig(), {"num_train_timesteps": 10**12}, "expected one integer from 1"),
    ],
)
def test_absurd_fields(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        type(config).from_dict({**config.to_dict(), **changes})
