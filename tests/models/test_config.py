"""A structure is understood wholly or refused."""

import inspect
import json
from typing import Any

import pytest

from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig, UnsupportedStructure
from tests.models.small import KL_F8, UNET, diffusers

CONFIGS = (UNET, KL_F8, ScheduleConfig(beta_end=0.02))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_round_trip(config: UNetConfig | AutoencoderConfig | ScheduleConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def defaults(theirs: type[Any]) -> dict[str, Any]:
    """As JSON has them: lists, not tuples."""
    parameters = list(inspect.signature(theirs).parameters.values())
    values: dict[str, Any] = json.loads(json.dumps({p.name: p.default for p in parameters}))
    return values


def test_absent_fields_are_what_diffusers_takes_for_them() -> None:
    """But for sample_size, which no module reads, the offset of 1, on which its pipelines insist, and the spacing, of
    which each of its samplers has one of its own."""
    size = {"sample_size": 64}
    offset = {"steps_offset": 1, "_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
    unet, autoencoder, schedule = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler
    assert UNetConfig.from_dict(size) == UNetConfig.from_dict(defaults(unet) | size)
    assert AutoencoderConfig.from_dict(size) == AutoencoderConfig.from_dict(defaults(autoencoder) | size)
    assert ScheduleConfig.from_dict(offset) == ScheduleConfig.from_dict(defaults(schedule) | offset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported; expected 'silu'"),
        ({"mid_block_type": None}, "expected 'UNetMidBlock2DCrossAttn'"),
        ({"only_cross_attention": [True, False]}, "expected False"),
        ({"addition_embed_type": "text_time"}, "expected None"),
        ({"invented": 1}, "invented=1 is not supported; expected its absence"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"transformer_layers_per_block": [1, 2]}, "expected one positive integer"),
        ({"layers_per_block": 0}, "expected one positive integer"),
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
        ({"attention_head_dim": 3}, "8 channels cannot be split into 3 attention heads"),
        ({"attention_head_dim": (2, 2, 2)}, "has 3 entries; expected one, or one per level"),
    ],
)
def test_unets_of_bad_dimensions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**vars(UNET), **changes})


def test_autoencoders_outside_the_code_are_refused() -> None:
    with pytest.raises(UnsupportedStructure, match="use_quant_conv=False"):
        AutoencoderConfig.from_dict({**KL_F8.to_dict(), "use_quant_conv": False})
    with pytest.raises(UnsupportedStructure, match="down_block_types"):
        AutoencoderConfig.from_dict({**KL_F8.to_dict(), "down_block_types": ["AttnDownEncoderBlock2D"] * 4})
    with pytest.raises(ValueError, match="4 channels cannot be split into norm_num_groups=3"):
        AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=3)


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
