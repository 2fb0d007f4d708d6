"""Noise schedule and the settings of its sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from models.config.fields import UnsupportedStructure, check_sizes, known_fields


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule and DDIM settings, diffusers' `DDIMScheduler`. `steps_offset` counts for leading spacing alone;
    a `timestep_spacing` of None leaves it to the sampler. Settings of other samplers that a file may hold are accepted
    where they leave the noise schedule and the plain form of the sampler as they are."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False

    # Latents are never clipped, whatever a file says: the original code does not, nor do diffusers' pipelines of Stable
    # Diffusion (though its DDIMScheduler would).
    _OFF: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "clip_sample": (False, True),
        "clip_sample_range": (1.0, 1),
        "dynamic_thresholding_ratio": (0.995,),
        "sample_max_value": (1.0, 1),
        "skip_prk_steps": (True, False),
        "thresholding": (False,),
        "trained_betas": (None,),
        # Of the samplers DDPM, Euler and DPM-Solver++, of which a file may name one as the usual.
        "algorithm_type": ("dpmsolver++",),
        "euler_at_final": (False,),
        "final_sigmas_type": ("zero",),
        "interpolation_type": ("linear",),
        "lambda_min_clipped": (float("-inf"), None),
        "lower_order_final": (True,),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "timestep_type": ("discrete",),
        "use_beta_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_karras_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "variance_type": ("fixed_small", None),
    }

    # What diffusers takes for a field that its file leaves out, where that is not what latent diffusion uses.
    _ABSENT: ClassVar[Mapping[str, Any]] = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "timestep_spacing": None,
        "steps_offset": 0,
    }

    def __post_init__(self) -> None:
        check_sizes(self, "num_train_timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas from {self.beta_start} to {self.beta_end}: expected to rise between 0 and 1")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset={self.steps_offset}: expected 0 or more")
        for name, allowed in (
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction_type", ("epsilon", "v_prediction", "sample")),
            ("timestep_spacing", ("leading", "trailing", "linspace", None)),
        ):
            if getattr(self, name) not in allowed:
                raise UnsupportedStructure(
                    f"{name}={getattr(self, name)!r} is not supported; expected one of {allowed}"
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        absent = {**cls._ABSENT, "set_alpha_to_one": data.get("_class_name") == "DDIMScheduler"}
        return cls(**known_fields(cls, {**absent, **data}, cls._OFF))

    def to_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"_class_name": "DDIMScheduler", "clip_sample": False, **fields}
