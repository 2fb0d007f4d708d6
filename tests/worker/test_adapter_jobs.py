"""Adapters on their way from the model's folder to the pictures of jobs."""

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broker.gateway_side import JobBroker
from broker.store import Store
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobSpec
from models.latent_diffusion import LatentDiffusion
from models.lora_files import FOLDER, load_adapters
from models.tasks import PictureRequest
from models.weights_io.tensors import WeightsError
from tests.adapter_files import adapter_of, write_kohya, write_peft
from tests.tiny_models import BASE
from tests.worker.running import StartWorker, ended, stored
from worker.build import build
from worker.engine.tuning import default_tuning, tune
from worker.main import ModelFolderError, load

MakeSpec = Callable[..., JobSpec]
CPU = torch.device("cpu")
FILM: dict[str, Any] = {"name": "film", "weight": 0.8}
NEON: dict[str, Any] = {"name": "neon", "weight": -0.5}


def write_adapters(folder: Path, model: LatentDiffusion) -> None:
    adapter_of(model, write_kohya, folder / FOLDER / "film.safetensors", rank=3, seed=1)
    adapter_of(model, write_peft, folder / FOLDER / "neon.safetensors", rank=4, seed=2)


@pytest.fixture
def folder(model_dir: Path, models: Mapping[str, LatentDiffusion], tmp_path: Path) -> Path:
    """The tiny model with two adapters."""
    shutil.copytree(model_dir / BASE, tmp_path / BASE)
    write_adapters(tmp_path / BASE, models[BASE])
    return tmp_path / BASE


def test_the_card_lists_what_the_folder_holds(folder: Path, model_dir: Path) -> None:
    assert load(model_dir / BASE).card.loras == ()
    assert load(folder).card.loras == ("film", "neon")


def test_a_broken_adapter_keeps_a_worker_from_starting(folder: Path) -> None:
    path = folder / FOLDER / "film.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"loras/film\.safetensors is no whole safetensors file"):
        load(folder)
    path.rename(path.with_name("film noir.safetensors"))
    shutil.copy(path.with_name("neon.safetensors"), path.with_name("film noir.safetensors"))
    with pytest.raises(ModelFolderError, match="has files whose names cannot be those of adapters"):
        load(folder)


def test_the_fingerprint_names_the_adapters(folder: Path) -> None:
    def fingerprint() -> str:
        engine, _ = build(Settings(worker_slots=1), [load(folder)], folder.parent, CPU)
        return engine.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    (folder / FOLDER / "neon.safetensors").replace(folder / FOLDER / "film.safetensors")
    assert fingerprint() != first


async def test_jobs_with_different_adapters_share_a_batch(
    gateway: JobBroker,
    start_worker: StartWorker,
    make_spec: MakeSpec,
    store: Store,
    models: Mapping[str, LatentDiffusion],
    tmp_path: Path,
) -> None:
    """Byte for byte the pictures that each makes alone, which are those of the plain loop within rounding."""
    write_adapters(tmp_path, models[BASE])
    plain = copy.copy(models[BASE])
    plain.adapters = load_adapters(tmp_path, plain)
    tuned = {name: tune(model, default_tuning(CPU)) for name, model in {**models, BASE: plain}.items()}
    wanted = [[FILM], [NEON], [FILM, NEON], []]

    def specs() -> list[JobSpec]:
        return [make_spec(loras=loras, prompt="a cat", steps=6) for loras in wanted]

    together = specs()
    for spec in together:
        await gateway.submit(spec)
    worker = start_worker(others=tuned, buckets=(4,), batching="exact")
    records = [await ended(gateway, spec) for spec in together]
    lane = {"model": BASE, "lane": "8x8 guided rank 8"}
    ticks = worker.metrics.registry.get_sample_value("darkroom_engine_ticks_total", lane)
    assert ticks is not None
    assert ticks < 3 * 6
    pictures = [np.asarray(stored(store, record)) for record in records]
    assert len({picture.tobytes() for picture in pictures}) == len(wanted)
    for spec, picture, loras in zip(specs(), pictures, wanted, strict=True):
        await gateway.submit(spec)
        assert np.array_equal(np.asarray(stored(store, await ended(gateway, spec))), picture)
        request = PictureRequest(
            "txt2img", "a cat", 64, 64, 7, 6, 3.0, loras=tuple((one["name"], one["weight"]) for one in loras)
        )
        assert np.abs(picture.astype(int) - np.asarray(plain.render(request)).astype(int)).max() <= 2


async def test_an_adapter_that_this_worker_lacks(
    gateway: JobBroker, start_worker: StartWorker, make_spec: MakeSpec
) -> None:
    """The gateway may know it from another worker."""
    spec = make_spec(loras=[FILM])
    await gateway.submit(spec)
    start_worker()
    record = await ended(gateway, spec)
    assert record.error is not None
    assert record.error.code is ErrorCode.VALIDATION_FAILED
    assert record.error.detail == "tiny has no adapter film here; it has: none"
