"""`darkroom render`: one job spec in this process, through the worker's own engine, without Redis or a server."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress

from cli import options
from cli.console import err, friendly_errors, out
from contract.settings import Settings
from contract.spec import JobSpec, Task

if TYPE_CHECKING:
    from contract.card import ModelCard
    from models.weights_io.single_file import Told
    from worker.batch_worker import ServedModel

Dtype = Literal["float32", "bfloat16", "float16"]


def render(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (JSON).", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("-o", "--out", "--output", help="Folder for the pictures.")] = Path(),
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A diffusers folder or single file, instead of the spec's model.", exists=True),
    ] = None,
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
    tokenizer: options.Tokenizer = None,
    prediction_type: options.Prediction = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Numbers to compute with. \\[default: as a worker here]")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="As torch names it: cpu, cuda:0.")] = "cpu",
    raw: Annotated[
        bool,
        typer.Option("--raw", help="As the decoder gives it: nothing pasted back, no tints corrected."),
    ] = False,
) -> None:
    """Make the pictures of one job spec in this process, without Redis or a server. Needs torch.

    What the spec leaves out takes the model's defaults; inputs are PNG files beside the spec:

    {"task": "inpaint", "model": "darkroom-small", "prompt": "a panda", "seed": 7, "width": 128, "height": 128,
    "inputs": {"image": "pizza.png", "mask": "mask.png"}}
    """
    from broker.store import Store
    from models.weights_io.single_file import Told
    from worker.main import ModelFolderError
    from worker.requests import BadJobError, job_warnings, load_inputs, picture_requests

    with friendly_errors():
        try:
            given = json.loads(spec_file.read_text(encoding="utf-8"))
            if not isinstance(given, dict) or not (model or "model" in given):
                raise ValueError("expected an object with the name of a `model`, or --model")
            folder = model or model_dir / str(given["model"])
            served = _served(folder, Told(tokenizer=tokenizer, prediction_type=prediction_type))
            spec = complete({**given, "model": served.card.name}, served.card)
            inputs = load_inputs(Store(f"file:{spec_file.resolve().parent}"), spec)
            requests = [replace(one, raw=raw) for one in picture_requests(spec, served.card, inputs)]
            for warning in job_warnings(spec, served.card, served.model.conditioner):
                err.print(f"warning: {warning.message}", style="yellow", markup=False)
            files = _make(served, spec, requests, folder.parent, _settings(dtype, trial=model is not None), device)
        except (ValueError, ModelFolderError, BadJobError) as error:
            raise typer.BadParameter(f"{spec_file}: {error}") from error
        output.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(files):
            path = output / f"{spec.id}-{index}.{spec.output_format.value}"
            path.write_bytes(data)
            out.print(f"{path}  seed {spec.picture_seed(index)}", highlight=False, markup=False)


def _settings(dtype: Dtype | None, *, trial: bool) -> Settings:
    """A worker's, less, in a trial of some model, the probe of which batches give equal bits: it takes many steps."""
    given: dict[str, Any] = {"batching": "fast"} if trial else {}
    return Settings(**given if dtype is None else {**given, "dtype": dtype})


def _served(path: Path, told: "Told") -> "ServedModel":
    """A model of the model directory, or another folder or file."""
    from cli.adding import opened
    from worker.batch_worker import ServedModel
    from worker.main import CARD, load

    return load(path.resolve()) if (path / CARD).is_file() or not path.exists() else ServedModel(*opened(path, told))


def complete(given: dict[str, Any], card: "ModelCard") -> JobSpec:
    """The spec with the model's defaults for what it leaves out. Raises `pydantic.ValidationError`."""
    task = given.get("task", Task.TXT2IMG.value)
    defaults = {
        "id": "render",
        "task": task,
        "width": card.default_width,
        "height": card.default_height,
        "steps": card.default_steps.get(task),
        "guidance_scale": card.default_guidance.get(task),
        "seed": 0,
        "created_at": 0,
    }
    return JobSpec.from_json(json.dumps({"version": "1"} | defaults | given))


def _make(
    served: "ServedModel", spec: JobSpec, requests: list[Any], model_dir: Path, settings: Settings, device: str
) -> list[bytes]:
    """The files, in order, as a worker with the same settings makes them. Raises `OSError` naming what failed."""
    from worker.build import build
    from worker.engine import numerics
    from worker.engine.events import RowFailed, RowFinished, RowProgress
    from worker.main import select
    from worker.outputs import encode

    numerics.pin(settings.worker_threads)
    engine, _ = build(settings, [served], model_dir, select(device))
    files: dict[int, bytes] = {}
    with Progress(console=err) as progress:
        bars = [progress.add_task(f"seed {request.seed}", total=spec.steps) for request in requests]
        for index, request in enumerate(requests):
            engine.submit(str(index), spec.model, request)
        while not engine.idle:
            for event in engine.tick():
                match event:
                    case RowProgress(row_id, step, steps):
                        progress.update(bars[int(row_id)], completed=step, total=steps)
                    case RowFinished(row_id, image):
                        files[int(row_id)] = encode(image, spec, int(row_id), served.card.digest)
                    case RowFailed(row_id, stage, error):
                        raise OSError(f"picture {row_id} failed ({stage}): {error}") from error
    return [files[index] for index in range(len(requests))]
