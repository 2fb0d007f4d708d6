"""Noise schedule q(z_t|z_0) = N(sqrt(abar_t) z_0, (1-abar_t) I) (DDPM, eq. 4) and the timesteps a sampler visits."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.config import ScheduleConfig

Spacing = Literal["leading", "trailing", "linspace"]


def _betas(config: ScheduleConfig) -> Tensor:
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float32) ** 2

    def abar(time: float) -> float:
        """Nichol & Dhariwal 2021, eq. 17."""
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


def _with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """abar_T becomes 0 and abar_1 stays: sqrt(abar) shifted and stretched (Lin et al. 2023, algorithm 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    abar = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


class NoiseSchedule:
    """abar_t for t in [0, T) in fp32, and the noising that goes with it."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        betas = _betas(config)
        if config.rescale_betas_zero_snr:
            betas = _with_zero_terminal_snr(betas)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)

    @property
    def final_alpha_cumprod(self) -> float:
        """abar of "before the first step"."""
        return 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def spacing(self, usual: Spacing) -> Spacing:
        """The model's, or the sampler's `usual` one for a model that states none."""
        return self.config.timestep_spacing or usual

    def check_steps(self, steps: int) -> None:
        """Raises ValueError outside [1, T]."""
        if not 1 <= steps <= self.config.num_train_timesteps:
            raise ValueError(f"steps={steps}: expected 1 to {self.config.num_train_timesteps}")

    def timesteps(self, steps: int, spacing: Spacing | None = None) -> list[int]:
        """The `steps` timesteps that DDIM and DDPM visit, descending; raises ValueError outside [1, T].

        Spacings are those of table 2 in Lin et al. 2023, rounded as diffusers does.
        """
        self.check_steps(steps)
        total, spacing = self.config.num_train_timesteps, spacing or self.spacing("leading")
        if spacing == "leading":
            ratio = total // steps
            chosen = np.arange(steps, dtype=np.float64)[::-1] * ratio + self.config.steps_offset
        elif spacing == "trailing":
            chosen = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
        else:
            chosen = np.linspace(0, total - 1, steps).round()[::-1]
        return [min(int(t), total - 1) for t in chosen]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, t [N] integer (DDPM, eq. 4)."""
        abar = self.alphas_cumprod.to(x0.device)[t].view(-1, *([1] * (x0.dim() - 1)))
        noised: Tensor = abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * noise
        return noised

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x0 (Salimans & Ho 2022, appendix D)."""
        abar = self.alphas_cumprod.to(x0.device)[t].view(-1, *([1] * (x0.dim() - 1)))
        v: Tensor = abar.sqrt().to(x0.dtype) * noise - (1 - abar).sqrt().to(x0.dtype) * x0
        return v
