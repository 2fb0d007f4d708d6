"""DDIM as a pure function of (x, model output, noise, coefficients); rows with different settings share one call.

Symbols (Song et al. 2021, DDIM): abar_t = `alphas_cumprod[t]` (the paper's alpha_t), abar_p that of the previous step,
sigma_t = eta sqrt((1-abar_p)/(1-abar_t)) sqrt(1-abar_t/abar_p) (eq. 16), x_0 the predicted clean latents,
    x_p = sqrt(abar_p) x_0 + sqrt(1-abar_p-sigma^2) epsilon + sigma noise   (eq. 12).
x_0 and epsilon are linear in x and the model's output, for epsilon- and v-prediction alike, so that a step is
    x_p = A x + B out + sigma noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.schedule import NoiseSchedule


def ddim_coefficients(schedule: NoiseSchedule, timesteps: Sequence[int], steps: int, eta: float) -> Tensor:
    """(A, B, sigma) for each of `timesteps` as fp32 [len(timesteps), 3].

    `timesteps` is `schedule.timesteps(steps)` or its tail (img2img); `steps` sets the stride T // steps to the previous
    timestep, as in diffusers, also where it does not divide T.
    """
    stride = schedule.config.num_train_timesteps // steps
    abar = schedule.alphas_cumprod
    t = torch.tensor(timesteps, dtype=torch.long)
    previous = t - stride
    abar_t = abar[t]
    abar_p = torch.where(previous >= 0, abar[previous.clamp(min=0)], schedule.final_alpha_cumprod)
    # In fp32 and in diffusers' order: with eta 1 and abar_t near 0 (cosine) the last root is of little but rounding
    # errors, and in fp64 a picture would differ from theirs by 1e-4. Below 0, where theirs turns to NaN, it is 0.
    sigma = eta * ((1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)).clamp(min=0).sqrt()
    direction = (1 - abar_p - sigma**2).clamp(min=0).sqrt().double()
    abar_t, abar_p = abar_t.double(), abar_p.double()
    signal, noise = abar_t.sqrt(), (1 - abar_t).sqrt()
    if schedule.config.prediction_type == "epsilon":
        # x_0 = (x - noise * out) / signal, epsilon = out
        a = abar_p.sqrt() / signal
        b = direction - abar_p.sqrt() * noise / signal
    else:
        # x_0 = signal * x - noise * out, epsilon = signal * out + noise * x (Salimans & Ho 2022)
        a = abar_p.sqrt() * signal + direction * noise
        b = direction * signal - abar_p.sqrt() * noise
    return torch.stack([a, b, sigma], dim=1).float()


def ddim_step(x: Tensor, out: Tensor, noise: Tensor, coefficients: Tensor) -> Tensor:
    """x, out, noise [P, z, h, w] in fp32 and (A, B, sigma) [P, 3] -> x of the previous timestep."""
    a, b, sigma = coefficients[:, :, None, None, None].unbind(1)
    return a * x + b * out + sigma * noise


def guide(out: Tensor, scale: Tensor) -> Tensor:
    """[unconditional P | conditional P] and scale [P] -> u + s (c - u), [P, ...] (Ho & Salimans 2022, eq. 6)."""
    unconditional, conditional = out.chunk(2)
    return unconditional + scale[:, None, None, None] * (conditional - unconditional)
