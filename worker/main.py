"""A worker process: load the models, warm up, take jobs until told to stop."""

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog
import torch
from pydantic import ValidationError

from contract.card import ModelCard
from contract.log import configure_log
from contract.settings import Settings
from models.config import UnsupportedStructure
from models.latent_diffusion import LatentDiffusion
from models.lora_files import FOLDER
from worker.batch_worker import BatchWorker, ServedModel
from worker.build import build
from worker.engine import numerics
from worker.engine.engine import Engine
from worker.engine.events import RowFailed
from worker.health import end_when_hopeless
from worker.measures import WorkerMetrics
from worker.requests import usual_request
from worker.store_outage import open_store

CARD: Final = "card.json"

_log = structlog.get_logger("darkroom.worker")


class ModelFolderError(ValueError):
    """A model cannot be served from its folder; the text says why."""


class DeviceError(ValueError):
    """There is no such device here."""


def main(
    settings: Settings, models: Sequence[str], model_dir: Path, device: str = "cpu", name: str | None = None
) -> None:
    """Serves `models`, each a folder in `model_dir`, until SIGTERM or SIGINT. Raises `ModelFolderError`, or
    `models.weights_io.tensors.WeightsError` for broken weights; `NumericsError` where `batching=exact` cannot be kept;
    `StoreRefusedError` where the picture store says no.

    `name` is the worker's in Redis, new at every start; None makes one. `device` as torch names it.
    """
    configure_log(settings.log_format)
    store = open_store(settings)
    threads = numerics.pin(settings.worker_threads)
    begun, chosen = time.monotonic(), select(device)
    engine, served = build(settings, (load(model_dir / model) for model in models), model_dir, chosen)
    warm_up(engine, served)
    _log.info(
        "models loaded",
        models=list(models),
        threads=threads,
        batching=settings.batching,
        fingerprint=engine.fingerprint,
        seconds=round(time.monotonic() - begun, 2),
    )
    metrics = WorkerMetrics()
    if settings.worker_metrics_port is not None:
        port = metrics.serve(settings.host, settings.worker_metrics_port)
        _log.info("metrics", url=f"http://{settings.host}:{port}/metrics")
    worker = BatchWorker(settings, served, engine, store, metrics, name)
    threading.Thread(target=end_when_hopeless, args=(metrics.pulse,), name="watchdog", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    worker.work()


def select(device: str) -> torch.device:
    """Raises `DeviceError` where this machine, or this build of torch, lacks the device."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise DeviceError(f"device {device} cannot be used: torch {torch.__version__} finds {count} CUDA devices")
        torch.cuda.set_device(chosen)  # else some library would open a context on the first GPU as well
    return chosen


def load(folder: Path) -> ServedModel:
    """The model and its card, which must agree on what the model does; the adapters found beside it are in both."""
    path = folder / CARD
    try:
        card = ModelCard.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path} is missing: expected a model folder with its card") from error
    except ValidationError as error:
        raise ModelFolderError(f"{path} is no model card: {error}") from error
    if card.name != folder.name:
        raise ModelFolderError(f"{path} is the card of {card.name}; expected that of {folder.name}")
    try:
        model = LatentDiffusion.load(folder)
    except UnsupportedStructure as error:
        raise ModelFolderError(f"{folder}: {error}") from error
    unable = {task.value for task in card.tasks} - model.tasks
    if unable:
        raise ModelFolderError(f"{path} promises {', '.join(sorted(unable))}, which these weights cannot do")
    if card.conditioning != model.conditioning:
        raise ModelFolderError(f"{path} says conditioning={card.conditioning}; these weights want {model.conditioning}")
    try:
        card = ModelCard.model_validate({**card.model_dump(), "loras": tuple(model.adapters)})
    except ValidationError as error:
        raise ModelFolderError(
            f"{folder / FOLDER} has files whose names cannot be those of adapters: {error}"
        ) from error
    return ServedModel(card, model)


def warm_up(engine: Engine, served: Mapping[str, ServedModel]) -> None:
    """One step of one picture per model, so that the first job finds every kernel loaded.

    Raises `ModelFolderError` when a model cannot make its picture.
    """
    for name, one in served.items():
        engine.submit(name, name, usual_request(one.card, steps=1))
    while not engine.idle:
        for event in engine.tick():
            if isinstance(event, RowFailed):
                raise ModelFolderError(f"{event.row_id} cannot make a picture: {event.error}") from event.error
