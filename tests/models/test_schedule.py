"""Noise schedule and timesteps against diffusers' `DDIMScheduler`."""

from typing import Any

import pytest
import torch

from models.config import ScheduleConfig
from models.schedule import NoiseSchedule
from tests.models.small import diffusers

SPACINGS = ("leading", "trailing", "linspace")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def both(**fields: object) -> tuple[NoiseSchedule, Any]:
    config = ScheduleConfig.from_dict({**ScheduleConfig().to_dict(), **fields})
    return NoiseSchedule(config), diffusers.DDIMScheduler.from_config(config.to_dict())


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_alphas_are_those_of_diffusers(beta_schedule: str) -> None:
    ours, theirs = both(beta_schedule=beta_schedule)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    x0, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([0, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=0)
    torch.testing.assert_close(ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=0, atol=0)


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_zero_terminal_snr_is_that_of_diffusers(beta_schedule: str) -> None:
    ours, theirs = both(beta_schedule=beta_schedule, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert ours.alphas_cumprod[-1] == 0
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 30, 50, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing: str, steps: int) -> None:
    """Also where they do not divide 1000. Leading spacing with an offset would leave the table at 1000 steps."""
    ours, theirs = both(timestep_spacing=spacing, steps_offset=0 if steps == 1000 else 1)
    theirs.set_timesteps(steps)
    assert ours.timesteps(steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        NoiseSchedule(ScheduleConfig()).timesteps(steps)
