"""Every sampler as a table of numbers against the scheduler of diffusers, run to the end on the same "model"."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ScheduleConfig
from models.samplers import SAMPLERS, Sampler, SamplingPlan, advance, guide, plan
from models.schedule import NoiseSchedule
from tests.models.small import diffusers

SCHEDULERS: dict[Sampler, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (1, 4, 3, 3)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers


def both(sampler: Sampler, **fields: object) -> tuple[NoiseSchedule, Any]:
    config = ScheduleConfig.from_dict({**ScheduleConfig().to_dict(), **fields})
    name, extra = SCHEDULERS[sampler]
    return NoiseSchedule(config), getattr(diffusers, name).from_config({**config.to_dict(), **extra})


def model(x: Tensor, t: float) -> Tensor:
    """Reads both of its inputs, fractions of t too."""
    return torch.tanh(x.flip(-1) * 0.8 + 0.3) + 0.2 * torch.sin(torch.tensor(0.05 * t))


def draws(seed: int = 3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(SHAPE, generator=generator)


def ours_to_the_end(sampling: SamplingPlan, x: Tensor, noises: Iterator[Tensor]) -> Tensor:
    clean = torch.zeros_like(x)
    for index, t in enumerate(sampling.timesteps):
        noise = next(noises) if sampling.stochastic else torch.zeros_like(x)
        x, clean = advance(x, model(x, t), clean, noise, sampling.coefficients[index : index + 1])
    return x


def theirs_to_the_end(scheduler: Any, timesteps: Tensor, x: Tensor, noises: Iterator[Tensor], **options: Any) -> Tensor:
    """`noises` replaces what the scheduler would draw."""
    generator = torch.Generator()
    for t in timesteps:
        out = model(scheduler.scale_model_input(x, t), float(t))
        with pytest.MonkeyPatch.context() as patch:
            name = type(scheduler).__module__ + ".randn_tensor"
            patch.setattr(name, lambda *_, **__: next(noises), raising=False)
            accepted = {"generator": generator} | options
            x = scheduler.step(out, t, x, **accepted).prev_sample
    return x


def assert_same_picture(ours: Tensor, theirs: Tensor) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 50])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_and_timesteps_are_those_of_diffusers(
    sampler: Sampler, spacing: str, prediction_type: str, steps: int
) -> None:
    if sampler == "euler_ancestral" and prediction_type == "sample":
        prediction_type = "epsilon"  # theirs knows no other
    ours, theirs = both(sampler, timestep_spacing=spacing, prediction_type=prediction_type)
    theirs.set_timesteps(steps)
    sampling = plan(ours, sampler, steps)
    assert list(sampling.timesteps) == pytest.approx(theirs.timesteps.tolist()[:steps], rel=0, abs=0)
    noises, same = draws(), draws()
    begin = next(noises)
    expected = theirs_to_the_end(theirs, theirs.timesteps[:steps], next(same) * theirs.init_noise_sigma, same)
    assert_same_picture(ours_to_the_end(sampling, sampling.scale * begin, noises), expected)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_with_eta(beta_schedule: str, set_alpha_to_one: bool, eta: float) -> None:
    fields = {"beta_schedule": beta_schedule, "set_alpha_to_one": set_alpha_to_one, "prediction_type": "v_prediction"}
    ours, theirs = both("ddim", **fields)
    theirs.set_timesteps(12)  # does not divide 1000
    noises, same = draws(), draws()
    expected = theirs_to_the_end(theirs, theirs.timesteps, next(same), same, eta=eta)
    assert_same_picture(ours_to_the_end(plan(ours, "ddim", 12, eta=eta), next(noises), noises), expected)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr(sampler: Sampler, spacing: str) -> None:
    ours, theirs = both(sampler, timestep_spacing=spacing, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    theirs.set_timesteps(8)
    sampling = plan(ours, sampler, 8)
    assert sampling.coefficients.isfinite().all()
    noises, same = draws(), draws()
    expected = theirs_to_the_end(theirs, theirs.timesteps, next(same) * theirs.init_noise_sigma, same)
    assert_same_picture(ours_to_the_end(sampling, sampling.scale * next(noises), noises), expected)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_beginning_at_a_noised_picture(sampler: Sampler, spacing: str, strength: float) -> None:
    ours, theirs = both(sampler, timestep_spacing=spacing)
    steps = 12
    theirs.set_timesteps(steps)
    begin = steps - int(steps * strength)
    timesteps = theirs.timesteps[begin:]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin)
    clean = torch.linspace(-1, 1, 36).reshape(SHAPE)
    noises, same = draws(), draws()
    noised = theirs.add_noise(clean, next(same), timesteps[:1])
    sampling = plan(ours, sampler, steps, strength=strength)
    x = sampling.noised(clean, next(noises))
    assert_same_picture(ours_to_the_end(sampling, x, noises), theirs_to_the_end(theirs, timesteps, noised, same))


def test_a_model_that_states_no_spacing_has_that_of_the_sampler() -> None:
    file = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
    config = ScheduleConfig.from_dict(file)
    assert "timestep_spacing" not in config.to_dict()
    for sampler, (name, _) in SCHEDULERS.items():
        theirs = getattr(diffusers, name).from_config(config.to_dict())
        theirs.set_timesteps(30)
        expected = theirs.timesteps.tolist()
        assert list(plan(NoiseSchedule(config), sampler, 30).timesteps) == expected, sampler


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_model_gives_its_picture_back(sampler: Sampler, prediction_type: str) -> None:
    """The predicted x_0 is exact at every step, however noisy."""
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction_type, timestep_spacing="trailing"))
    sampling = plan(schedule, sampler, 25)
    target = torch.linspace(-1, 1, 36).reshape(SHAPE)
    noises = draws()
    x, clean = sampling.noised(target, next(noises)), torch.zeros(SHAPE)
    for row in sampling.coefficients[:, None]:
        c, d = row[0, 4].item(), row[0, 5].item()
        out = (target - c * x) / d
        x, clean = advance(x, out, clean, next(noises) if sampling.stochastic else torch.zeros(SHAPE), row)
        torch.testing.assert_close(clean, target, rtol=0, atol=1e-4)
    torch.testing.assert_close(x, target, rtol=0, atol=0.1)  # DDIM ends at abar[0], a little short of 1


@pytest.mark.parametrize(
    ("steps", "strength", "sampler"), [(0, 1.0, "ddim"), (1001, 1.0, "euler"), (0, 1.0, "dpmpp_2m")]
)
def test_impossible_steps_are_refused(steps: int, strength: float, sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        plan(NoiseSchedule(ScheduleConfig(timestep_spacing="linspace")), sampler, steps, strength=strength)


def test_impossible_strength_and_sampler_are_refused() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    with pytest.raises(ValueError, match="strength"):
        plan(schedule, "ddim", 5, strength=1.5)
    with pytest.raises(ValueError, match="expected one of ddim, ddpm"):
        plan(schedule, "heun", 5)  # type: ignore[arg-type]


def test_rows_of_one_step_have_samplers_of_their_own() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    rows = torch.cat([plan(schedule, sampler, 9, eta=0.5).coefficients[4:5] for sampler in SAMPLERS])
    count = len(SAMPLERS)
    x, out, previous, noise = (torch.randn(count, 4, 3, 3) for _ in range(4))
    together = advance(x, out, previous, noise, rows)
    for row in range(count):
        one = slice(row, row + 1)
        alone = advance(x[one], out[one], previous[one], noise[one], rows[one])
        assert all(torch.equal(many[one], single) for many, single in zip(together, alone, strict=True))


def test_guidance_is_per_row() -> None:
    unconditional, conditional = torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3)
    guided = guide(torch.cat([unconditional, conditional]), torch.tensor([1.0, 7.5]))
    assert guided[:, 0, 0, 0].tolist() == [1.0, 7.5]
