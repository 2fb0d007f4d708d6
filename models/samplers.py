"""Samplers as tables: every step of every sampler is one linear formula, so that rows with any of them share a call.

With (alpha_t, sigma_t) = (sqrt(abar_t), sqrt(1 - abar_t)) the latents are x = alpha_t x_0 + sigma_t epsilon throughout
(diffusers keeps Euler's as x / alpha_t, which is the same picture). x_0 and epsilon are linear in x and the model's
output for every kind of prediction, hence with h the x_0 predicted one step before and n fresh noise
    x_0 = C x + D out,    x_next = A x + B out + H h + S n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from models.schedule import NoiseSchedule, Spacing

Sampler = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m"]
SAMPLERS: Final[tuple[Sampler, ...]] = get_args(Sampler)
COLUMNS: Final = 6
"""A, B, H, S, C, D."""

_TINY_ABAR: Final = 2.0**-24
"""Stands for an abar of 0, whose noise-to-signal ratio is infinite, where a sampler divides by the signal."""


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """`coefficients` fp32 [len(timesteps), 6]; `timesteps` descending in [0, T), fractional for some.

    Latents start as `scale` times noise, or, from a picture, as `signal` x_0 + `noise` epsilon. `stochastic`: every
    step takes fresh noise. `has_history`: steps look at the previous x_0.
    """

    timesteps: tuple[float, ...]
    coefficients: Tensor
    scale: float
    signal: float
    noise: float
    stochastic: bool
    has_history: bool

    @property
    def fractional(self) -> bool:
        return any(t != int(t) for t in self.timesteps)

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents and noise, both [1, z, h, w] -> the latents of the first step."""
        return self.signal * clean + self.noise * noise


def plan(
    schedule: NoiseSchedule, sampler: Sampler, steps: int, *, eta: float = 0.0, strength: float = 1.0
) -> SamplingPlan:
    """What the sampler does in `steps` steps, or in the last int(`steps` * `strength`) of them (at least one).

    `eta` in [0, 1] is DDIM's alone. Raises ValueError for steps outside [1, T], a strength outside (0, 1] or an
    unknown sampler.
    """
    if sampler not in _PLANNERS:
        raise ValueError(f"sampler={sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength={strength}: expected more than 0, at most 1")
    return _PLANNERS[sampler](schedule, steps, max(int(steps * strength), 1), eta)


def advance(x: Tensor, out: Tensor, previous: Tensor, noise: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """x, model output, previous x_0 and noise, all [P, z, h, w] in fp32, coefficients [P, 6] -> next x, x_0."""
    a, b, h, s, c, d = coefficients[:, :, None, None, None].unbind(1)
    return a * x + b * out + h * previous + s * noise, c * x + d * out


def remaining_noise(schedule: NoiseSchedule, timesteps: Sequence[float]) -> Tensor:
    """(signal, noise) of latents at the timestep that each step leads to, fp32 [steps, 2]; after the last (1, 0)."""
    _, _, alpha_p, ratio_p = _towards_clean(schedule, timesteps)
    return torch.stack([alpha_p, alpha_p * ratio_p], dim=1).float()


def put_back(x: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, levels: Tensor) -> Tensor:
    """Inpainting with a UNet that sees no mask: what is kept of the `clean` latents [P, z, h, w], noised as `levels`
    [P, 2], a step's `remaining_noise`, say, replaces what the step made of it; mask [P, 1, h, w], 1 = repaint."""
    signal, sigma = levels[:, :, None, None, None].unbind(1)
    return (1 - mask) * (signal * clean + sigma * noise) + mask * x


def guide(out: Tensor, scale: Tensor) -> Tensor:
    """[unconditional P | conditional P] and scale [P] -> u + s (c - u), [P, ...] (Ho & Salimans 2022, eq. 6)."""
    unconditional, conditional = out.chunk(2)
    return unconditional + scale[:, None, None, None] * (conditional - unconditional)


@dataclasses.dataclass(frozen=True)
class _Prediction:
    """x_0 = c x + d out and epsilon = e x + f out, one entry per step, in fp64."""

    c: Tensor
    d: Tensor
    e: Tensor
    f: Tensor

    @classmethod
    def of(cls, kind: str, alpha: Tensor, sigma: Tensor) -> _Prediction:
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        if kind == "epsilon":
            alpha = torch.where(alpha == 0, _TINY_ABAR**0.5, alpha)
            return cls(1 / alpha, -sigma / alpha, zero, one)
        if kind == "v_prediction":  # Salimans & Ho 2022, appendix D
            return cls(alpha, -sigma, sigma, alpha)
        return cls(zero, one, 1 / sigma, -alpha / sigma)

    def towards(self, clean: Tensor, noise: Tensor, *, history: Tensor | None = None, fresh: Tensor) -> Tensor:
        """Rows of x_next = clean x_0 + noise epsilon + history h + fresh n."""
        a, b = clean * self.c + noise * self.e, clean * self.d + noise * self.f
        return self.table(a, b, history, fresh)

    def table(self, a: Tensor, b: Tensor, history: Tensor | None, fresh: Tensor) -> Tensor:
        h = torch.zeros_like(a) if history is None else history
        return torch.stack([a, b, h, fresh.double(), self.c, self.d], dim=1).float()


def _ddim(schedule: NoiseSchedule, steps: int, run: int, eta: float) -> SamplingPlan:
    """DDIM (Song et al. 2021, eq. 12 and 16). The stride T // steps is kept where it does not divide T, as in
    diffusers, and the last step ends at the schedule's `final_alpha_cumprod`."""
    timesteps = schedule.timesteps(steps)[-run:]
    t = torch.tensor(timesteps)
    previous = t - schedule.config.num_train_timesteps // steps
    abar_t = schedule.alphas_cumprod[t]
    abar_p = torch.where(previous >= 0, schedule.alphas_cumprod[previous.clamp(min=0)], schedule.final_alpha_cumprod)
    # In fp32 and in diffusers' order: with eta 1 and abar_t near 0 (cosine) the last root is of little but rounding
    # errors, and in fp64 a picture would differ from theirs by 1e-4. Below 0, where theirs turns to NaN, it is 0.
    fresh = eta * ((1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)).clamp(min=0).sqrt()
    direction = (1 - abar_p - fresh**2).clamp(min=0).sqrt().double()
    prediction = _prediction(schedule, abar_t)
    table = prediction.towards(abar_p.double().sqrt(), direction, fresh=fresh)
    return _plan(timesteps, table, abar_t[0], stochastic=eta > 0)


def _ddpm(schedule: NoiseSchedule, steps: int, run: int, _: float) -> SamplingPlan:
    """Ancestral sampling (Ho et al. 2020, eq. 6 and 7, fixed small variance) between the visited timesteps; the last
    step ends at the clean picture."""
    timesteps = schedule.timesteps(steps)[-run:]
    abar_t = schedule.alphas_cumprod[torch.tensor(timesteps)].double()
    abar_p = torch.cat([abar_t[1:], torch.ones(1, dtype=torch.float64)])
    alpha = abar_t / abar_p
    variance = (1 - abar_p) / (1 - abar_t) * (1 - alpha)
    clean, same = abar_p.sqrt() * (1 - alpha) / (1 - abar_t), alpha.sqrt() * (1 - abar_p) / (1 - abar_t)
    prediction = _prediction(schedule, abar_t)
    table = prediction.table(clean * prediction.c + same, clean * prediction.d, None, variance.sqrt())
    return _plan(timesteps, table, abar_t[0], stochastic=True)


def _euler(schedule: NoiseSchedule, steps: int, run: int, _: float) -> SamplingPlan:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn)."""
    timesteps = _euler_timesteps(schedule, steps)
    alpha, sigma, alpha_p, ratio_p = _towards_clean(schedule, timesteps[-run:])
    prediction = _Prediction.of(schedule.config.prediction_type, alpha, sigma)
    table = prediction.towards(alpha_p, alpha_p * ratio_p, fresh=torch.zeros_like(alpha))
    return _plan_from_ratio(schedule, timesteps[-run:], table, alpha, sigma, stochastic=False)


def _euler_ancestral(schedule: NoiseSchedule, steps: int, run: int, _: float) -> SamplingPlan:
    """Euler's method down to less noise than due, and fresh noise up to what is due (k-diffusion's ancestral step)."""
    timesteps = _euler_timesteps(schedule, steps)
    alpha, sigma, alpha_p, ratio_p = _towards_clean(schedule, timesteps[-run:])
    ratio = sigma / alpha
    up = (ratio_p**2 * (ratio**2 - ratio_p**2)).clamp(min=0).sqrt() / ratio
    down = (ratio_p**2 - up**2).clamp(min=0).sqrt()
    prediction = _Prediction.of(schedule.config.prediction_type, alpha, sigma)
    table = prediction.towards(alpha_p, alpha_p * down, fresh=alpha_p * up)
    return _plan_from_ratio(schedule, timesteps[-run:], table, alpha, sigma, stochastic=True)


def _dpmpp_2m(schedule: NoiseSchedule, steps: int, run: int, _: float) -> SamplingPlan:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): first order at the first and the last step."""
    visited = _dpm_timesteps(schedule, steps)[-run:]
    alpha, sigma, alpha_p, ratio_p = _towards_clean(schedule, visited)
    sigma_p = alpha_p * ratio_p
    lambda_t, lambda_p = (alpha / sigma).log(), -ratio_p.log()  # the last one infinite
    h = lambda_p - lambda_t
    gain = alpha_p * -torch.expm1(-h)
    look_back = torch.zeros_like(gain)  # 1 / (2 r) of the paper
    look_back[1:-1] = torch.where(h[:-2] > 0, h[1:-1] / (2 * h[:-2]), 0.0)
    prediction = _Prediction.of(schedule.config.prediction_type, alpha, sigma)
    clean = gain * (1 + look_back)
    table = prediction.table(
        sigma_p / sigma + clean * prediction.c, clean * prediction.d, -gain * look_back, torch.zeros_like(gain)
    )
    return _plan(visited, table, alpha[0] ** 2, stochastic=False, has_history=True)


_PLANNERS: Final[dict[str, Callable[[NoiseSchedule, int, int, float], SamplingPlan]]] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "euler": _euler,
    "euler_ancestral": _euler_ancestral,
    "dpmpp_2m": _dpmpp_2m,
}


def _prediction(schedule: NoiseSchedule, abar: Tensor) -> _Prediction:
    abar = abar.double()
    return _Prediction.of(schedule.config.prediction_type, abar.sqrt(), (1 - abar).sqrt())


def _plan(
    timesteps: Sequence[float], table: Tensor, abar: Tensor, *, stochastic: bool, has_history: bool = False
) -> SamplingPlan:
    """A plan that begins at pure noise of variance 1; `abar` is that of the first step."""
    signal, noise = float(abar.float().sqrt()), float((1 - abar.float()).sqrt())
    return SamplingPlan(tuple(timesteps), table, 1.0, signal, noise, stochastic, has_history)


def _plan_from_ratio(
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    table: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    stochastic: bool,
) -> SamplingPlan:
    """Euler's samplers begin at noise of variance sigma^2, and at 1 with leading spacing, as in diffusers."""
    begun = _plan(timesteps, table, alpha[0] ** 2, stochastic=stochastic)
    leading = schedule.spacing("linspace") == "leading"
    return dataclasses.replace(begun, scale=1.0 if leading else float(sigma[0]))


def _towards_clean(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma) at each timestep; alpha and sigma / alpha at the next one, the clean picture after the last.

    sigma / alpha is interpolated at fractional timesteps, all fp64.
    """
    abar = torch.where(schedule.alphas_cumprod == 0, _TINY_ABAR, schedule.alphas_cumprod)
    ratios = ((1 - abar) / abar).sqrt().numpy()
    ratio = torch.from_numpy(np.interp(timesteps, np.arange(len(ratios)), ratios)).float().double()
    ratio_p = torch.cat([ratio[1:], torch.zeros(1, dtype=torch.float64)])
    alpha, alpha_p = (1 / (1 + one**2).sqrt() for one in (ratio, ratio_p))
    return alpha, alpha * ratio, alpha_p, ratio_p


def _euler_timesteps(schedule: NoiseSchedule, steps: int) -> list[float]:
    spacing: Spacing = schedule.spacing("linspace")
    if spacing != "linspace":
        return [float(t) for t in schedule.timesteps(steps, spacing)]
    schedule.check_steps(steps)
    visited = np.linspace(0, schedule.config.num_train_timesteps - 1, steps, dtype=np.float32)[::-1]
    return [float(t) for t in visited]


def _dpm_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """As diffusers' multistep solver spaces them: a point more than steps, of which the least noisy is left out."""
    spacing, total = schedule.spacing("linspace"), schedule.config.num_train_timesteps
    if spacing == "trailing":
        return schedule.timesteps(steps, spacing)
    schedule.check_steps(steps)
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, total - 1, steps + 1).round()[:0:-1]]
    chosen = np.arange(steps, 0, -1) * (total // (steps + 1)) + schedule.config.steps_offset
    return [min(int(t), total - 1) for t in chosen]
