"""Noise schedule, timesteps and DDIM steps against diffusers' `DDIMScheduler`."""

from typing import Any

import pytest
import torch

from models.config import ScheduleConfig
from models.samplers import ddim_coefficients, ddim_step, guide
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


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_a_step_is_that_of_diffusers(
    beta_schedule: str, spacing: str, set_alpha_to_one: bool, prediction_type: str, eta: float
) -> None:
    ours, theirs = both(
        beta_schedule=beta_schedule,
        timestep_spacing=spacing,
        set_alpha_to_one=set_alpha_to_one,
        prediction_type=prediction_type,
    )
    steps = 12  # does not divide 1000
    theirs.set_timesteps(steps)
    timesteps = ours.timesteps(steps)
    coefficients = ddim_coefficients(ours, timesteps, steps, eta)
    x, out, noise = (torch.randn(1, 4, 3, 3) for _ in range(3))
    for index, t in enumerate(timesteps):
        expected = theirs.step(out, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        scale = max(1.0, expected.abs().max().item())  # epsilon at the noisy end of a cosine schedule: 10^4
        got = ddim_step(x, out, noise, coefficients[index : index + 1])
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=2e-6)


def test_rows_of_one_step_have_settings_of_their_own() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    rows = [ddim_coefficients(schedule, schedule.timesteps(n), n, eta)[:1] for n, eta in ((5, 0.0), (9, 1.0))]
    x, out, noise = (torch.randn(2, 4, 3, 3) for _ in range(3))
    together = ddim_step(x, out, noise, torch.cat(rows))
    for row in range(2):
        one = slice(row, row + 1)
        assert torch.equal(together[one], ddim_step(x[one], out[one], noise[one], rows[row]))


def test_guidance_is_per_row() -> None:
    unconditional, conditional = torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3)
    guided = guide(torch.cat([unconditional, conditional]), torch.tensor([1.0, 7.5]))
    assert guided[:, 0, 0, 0].tolist() == [1.0, 7.5]
