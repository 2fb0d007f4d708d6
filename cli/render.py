"""`darkroom render`: one job spec in this process, through the worker's own engine, without Redis or a server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.progress import Progress

from cli import options
from cli.console import err, friendly_errors, out
from contract.settings import Settings
from contract.spec import JobSpec, Task

if TYPE_CHECKING:
    from contract.card import ModelCard
    from worker.batch_worker import ServedModel


def render(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (JSON).", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.")] = Path(),
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Make the pictures of one job spec in this process, without Redis or a server. Needs torch.

    What the spec leaves out takes the model's defaults; inputs are PNG files beside the spec:

    {"task": "inpaint", "model": "darkroom-small", "prompt": "a panda", "seed": 7, "width": 128, "height": 128,
    "inputs": {"image": "pizza.png", "mask": "mask.png"}}
    """
    from broker.store import Store
    from worker.main import ModelFolderError, load
    from worker.requests import BadJobError, job_warnings, load_inputs, picture_requests

    with friendly_errors():
        given = json.loads(spec_file.read_text(encoding="utf-8"))
        try:
            served = load(model_dir / str(given["model"]))
            spec = complete(given, served.card)
            inputs = load_inputs(Store(f"file:{spec_file.resolve().parent}"), spec)
            requests = picture_requests(spec, served.card, inputs)
        except (KeyError, ModelFolderError, ValidationError, BadJobError) as error:
            raise typer.BadParameter(f"{spec_file}: {error}") from error
        for warning in job_warnings(spec, served.card, served.model.conditioner):
            err.print(f"warning: {warning.message}", style="yellow", markup=False)
        output.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(_make(served, spec, requests, model_dir)):
            path = output / f"{spec.id}-{index}.{spec.output_format.value}"
            path.write_bytes(data)
            out.print(f"{path}  seed {spec.picture_seed(index)}", highlight=False, markup=False)


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


def _make(served: "ServedModel", spec: JobSpec, requests: list[Any], model_dir: Path) -> list[bytes]:
    """The files, in order, as a worker with the same settings makes them. Raises `OSError` naming what failed."""
    import torch

    from worker.build import build
    from worker.engine import numerics
    from worker.engine.events import RowFailed, RowFinished, RowProgress
    from worker.outputs import encode

    settings = Settings()
    numerics.pin(settings.worker_threads)
    engine, _ = build(settings, {spec.model: served}, model_dir, torch.device("cpu"))
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
