"""`darkroom bench`: measurements that a worker reads later."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.console import friendly_errors, out
from cli.server import DEFAULT_MODELS, model_names

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion
    from worker.batch_worker import ServedModel
    from worker.engine.calibration import DeviceCalibration
    from worker.engine.scheduler import LaneKey

app = typer.Typer(no_args_is_help=True, help="Measure models on this machine.")

_PROMPTS = ("a pizza on a blue background", "a panda", "two things")


@app.callback()
def _group() -> None:
    """Keeps `calibrate` a command of its own while it is the only one."""


@app.command()
def calibrate(
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
    models: Annotated[str, typer.Option("--models", help="Models to measure, comma-separated.")] = DEFAULT_MODELS,
    device: Annotated[str, typer.Option("--device", help="As torch names it: cpu, cuda:0.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. \\[default: all cores]")] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Largest batch to try.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Repetitions; medians count.")] = 7,
) -> None:
    """Measure the fastest form of each model and the batch that fills this device; keep both beside the weights.

    Writes calibration.json into each model's folder, where other kinds of devices keep their entries. Workers read it
    when they start. Leave the machine alone while this runs: a minute or two per model.
    """
    from worker.engine import numerics
    from worker.engine.calibration import Calibration, CalibrationError
    from worker.engine.measure import Plan, measure
    from worker.main import DeviceError, ModelFolderError, load, select

    with friendly_errors():
        try:
            numerics.pin(threads)
            chosen = select(device)
            for name in model_names(models):
                served = load(model_dir / name)
                plan = Plan(lanes_of(served), slots, rounds, partial(smallest_psnr, served))
                entry = measure(served.model.to(chosen), plan)
                kept = Calibration.read(model_dir / name)
                kept.with_device(numerics.device_kind(chosen), entry).write(model_dir / name)
                out.print(f"{name} on {numerics.device_kind(chosen)}: {summary(entry)}", markup=False, highlight=False)
        except (ModelFolderError, DeviceError, CalibrationError, numerics.NumericsError) as error:
            raise typer.BadParameter(str(error)) from error


def lanes_of(served: "ServedModel") -> list["LaneKey"]:
    """The usual lane, and the same with or without guidance, if the model can be guided."""
    from worker.build import usual_lane

    usual, conditioner = usual_lane(served.card), served.model.conditioner
    if conditioner is None or not conditioner.learns_unconditional:
        return [dataclasses.replace(usual, guided=False)]
    return [usual, dataclasses.replace(usual, guided=not usual.guided)]


def smallest_psnr(served: "ServedModel", one: "LatentDiffusion", other: "LatentDiffusion") -> float:
    """In dB, over a few pictures that the two forms of a model make of the same requests."""
    import numpy as np

    from worker.requests import usual_request

    found = []
    for seed, prompt in enumerate(_PROMPTS):
        request = usual_request(served.card, prompt, seed)
        pair = [np.asarray(model.render(request), dtype=float) for model in (one, other)]
        found.append(10 * np.log10(255**2 / max(float(((pair[0] - pair[1]) ** 2).mean()), 1e-9)))
    return round(float(min(found)), 1)


def summary(entry: "DeviceCalibration") -> str:
    parts = [f"{entry.threads} threads; auto is {entry.dtype}"]
    for dtype, one in entry.measured.items():
        tuning = ", ".join(f"{key} {value}" for key, value in one.tuning.to_json().items() if key != "dtype")
        parts.append(f"{dtype}: {tuning}; batch {dict(one.buckets)}; ms per step {one.milliseconds}")
    if entry.psnr is not None:
        parts.append(f"bf16 against fp32: PSNR {entry.psnr:g} dB at least")
    return "\n  ".join(parts)
