"""The diffusion loss L_LDM (Rombach et al. 2022, eq. 3) with the choices that mattered at this size."""

from __future__ import annotations

import torch
from torch import Tensor

from models.schedule import NoiseSchedule


def draw_timesteps(batch: int, total: int, generator: torch.Generator) -> Tensor:
    """[batch] in [0, total): 40 % from the noisy range 0.6 T to 0.95 T, where what is in the picture is decided."""
    t = torch.randint(total, (batch,), generator=generator)
    noisy = torch.randint(int(0.6 * total), int(0.95 * total), (batch,), generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < 0.4, noisy, t)


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """2 min(SNR, gamma) / (SNR + 1): min-SNR for v-prediction (Hang et al. 2023), doubled to average near 1."""
    abar = schedule.alphas_cumprod[t]
    snr = abar / (1 - abar)
    return 2.0 * snr.clamp(max=gamma) / (snr + 1)


def target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the UNet should predict under the schedule's `prediction_type`."""
    return noise if schedule.config.prediction_type == "epsilon" else schedule.velocity(x0, noise, t)
