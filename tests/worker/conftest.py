"""Tiny random models, built once per session."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from broker.store import Store
from contract.settings import Settings
from models.latent_diffusion import LatentDiffusion
from tests.tiny_models import BASE, UPSCALER, save_tiny_models, tiny_base, tiny_upscaler
from tests.worker.running import RunningWorker, StartWorker


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, LatentDiffusion]:
    """On DARKROOM_TEST_DEVICE, which `make gpu` sets where there is one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    device = os.environ.get("DARKROOM_TEST_DEVICE", "cpu")
    return {BASE: tiny_base(folder / BASE).to(device), UPSCALER: tiny_upscaler(folder / UPSCALER).to(device)}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models as folders."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """50 x 37 pixels: no multiple of anything."""
    colours = Image.linear_gradient("L").resize((50, 37))
    return Image.merge("RGB", (colours, colours.transpose(Image.Transpose.ROTATE_180), colours.point(lambda v: v // 2)))


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """White in the middle of 50 x 37."""
    hole = Image.new("L", (50, 37))
    hole.paste(255, (12, 9, 40, 30))
    return hole


@pytest.fixture
def start_worker(settings: Settings, models: Mapping[str, LatentDiffusion]) -> Iterator[StartWorker]:
    started: list[RunningWorker] = []

    def start(
        drain_seconds: float = 30.0,
        resume_seconds: float = 3.0,
        others: Mapping[str, LatentDiffusion] | None = None,
        **engine: Any,
    ) -> RunningWorker:
        changed = settings.model_copy(update={"drain_seconds": drain_seconds, "resume_seconds": resume_seconds})
        worker = RunningWorker(changed, others or models, **engine)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store(settings.store_url)
