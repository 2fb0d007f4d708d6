"""From loaded models to the engine that serves them: tuned, probed and named, as the settings ask."""

import dataclasses
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

import torch

from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import Task
from models.latent_diffusion import LatentDiffusion
from worker.batch_worker import ServedModel
from worker.engine import numerics
from worker.engine.calibration import Calibration
from worker.engine.engine import Engine
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Dtype, Tuning, default_tuning, tune

_NO_BUCKETS: Final[Mapping[str, int]] = {}
_PACKAGES: Final = ("darkroom", "transformers", "tokenizers")
"""Beside torch and numpy: what turns a request into numbers."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a model is run. `buckets` by lane label, as measured; empty where nothing was."""

    tuning: Tuning
    buckets: Mapping[str, int]

    def bucket(self, key: LaneKey) -> int | None:
        """Adapters and blending add little to a step: a lane with them is as wide as the same one without."""
        return self.buckets.get(dataclasses.replace(key, blends=False, rank=0).label)


def build(
    settings: Settings, loaded: Iterable[ServedModel], model_dir: Path, device: torch.device
) -> tuple[Engine, dict[str, ServedModel]]:
    """The engine, and by name the models in their tuned form, which replace those given. Each of `loaded` is tuned
    before the next is asked for, so that no two are in memory untuned.

    Raises `CalibrationError` for an unreadable calibration, `numerics.NumericsError` where `batching=exact` cannot be
    kept.
    """
    choices: dict[str, Choice] = {}
    weights: dict[str, str] = {}
    residents: dict[str, ResidentModel] = {}
    served: dict[str, ServedModel] = {}
    for one in loaded:
        name, lane = one.card.name, usual_lane(one.card)
        choices[name] = choose(Calibration.read(model_dir / name), device, settings.dtype)
        weights[name] = one.card.digest or numerics.weights_digest(one.model)
        tuned = tune(one.model.to(device), choices[name].tuning, (lane.height, lane.width))
        residents[name] = ResidentModel(tuned)
        served[name] = dataclasses.replace(one, model=tuned)
        del one
    plan = numerics.ExactPlan(residents, settings.worker_slots, lambda key: choices[key.model].bucket(key))
    exact = settings.batching == "exact"
    proven = {name: plan.prove(usual_lane(one.card)) for name, one in served.items()} if exact else {}
    facts = {
        name: {
            "weights": weights[name],
            "structure": _structure(one.model),
            "adapters": {adapter: file.digest for adapter, file in one.model.adapters.items()},
            "tuning": choices[name].tuning.to_json(),
            "calibrated": dict(choices[name].buckets),
            "buckets": proven.get(name),
        }
        for name, one in served.items()
    }
    engine = Engine(
        residents,
        buckets=plan if exact else buckets(settings.worker_slots),
        batching=settings.batching,
        capacity=2 * settings.worker_slots,
        fingerprint=numerics.fingerprint(
            device,
            facts,
            packages={package: version(package) for package in _PACKAGES},
            batching=settings.batching,
            slots=settings.worker_slots,
        ),
    )
    return engine, served


def _structure(model: LatentDiffusion) -> list[str]:
    """What the same weights may be read as: kind of prediction, spacing, scaling factor, number of heads."""
    schedules = [one.config for one in (model.schedule, model.low_res_schedule) if one is not None]
    return [repr(config) for config in (model.unet.config, model.autoencoder.config, *schedules)]


def choose(calibration: Calibration, device: torch.device, wanted: Literal["auto"] | Dtype) -> Choice:
    """As measured on such a device."""
    entry = calibration.devices.get(numerics.device_kind(device))
    dtype: Dtype = "bfloat16" if device.type == "cuda" else "float32"
    if wanted != "auto":
        dtype = wanted
    elif entry is not None:
        dtype = entry.dtype
    if entry is None or dtype not in entry.measured:
        return Choice(default_tuning(device, dtype), _NO_BUCKETS)
    return Choice(entry.measured[dtype].tuning, entry.measured[dtype].buckets)


def usual_lane(card: ModelCard) -> LaneKey:
    """Where a request that leaves all to the model ends up."""
    task = card.tasks[0]
    divisor = (card.upscale_factor or 1) if task is Task.UPSCALE else card.latent_downsample
    height, width = -(-card.default_height // divisor), -(-card.default_width // divisor)
    return LaneKey(card.name, height, width, guided=card.default_guidance[task] > 1.0)


def buckets(slots: int) -> tuple[int, ...]:
    """Batch sizes of a forward pass where bits do not count: powers of two, and the number of slots itself."""
    return tuple(sorted({*numerics.powers_of_two(slots), slots}))
