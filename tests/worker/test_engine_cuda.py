"""On a GPU a step is one graph; what it computes is what its kernels compute one by one."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from broker.store import Store
from contract import metrics
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from tests.tiny_models import BASE, base_card
from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.engine import Engine
from worker.engine.events import RowFailed, RowFinished, RowHandedBack
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.measures import WorkerMetrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

REQUEST = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=6, eta=1.0)


@pytest.fixture
def resident(models: Mapping[str, LatentDiffusion]) -> ResidentModel:
    return ResidentModel(models[BASE].to("cuda"))


@torch.inference_mode()
def test_a_graph_takes_the_same_steps_as_its_kernels(resident: ResidentModel) -> None:
    key = LaneKey(BASE, 8, 8, guided=True)
    banks = [Bank(resident, key, 4) for _ in range(2)]
    for bank in banks:
        runner.admit(resident, bank, 1, REQUEST)
    for _ in range(3):
        runner.step(resident, banks[0], slice(0, 4))
        runner._step(resident, banks[1], slice(0, 4))
        torch.testing.assert_close(banks[0].x, banks[1].x, rtol=0, atol=1e-5)
        assert torch.equal(banks[0].step, banks[1].step)


def test_out_of_memory_for_real_hands_rows_back(resident: ResidentModel) -> None:
    """The bank of a huge lane does not fit beside the rows of another, and fails alone."""
    total = torch.cuda.mem_get_info()[1]
    engine = Engine({BASE: resident}, buckets=(4,), batching="exact", capacity=1e9)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**28) / total))
    try:
        engine.submit("small", BASE, REQUEST)
        engine.tick()
        engine.submit("huge", BASE, PictureRequest("txt2img", "a cat", 8192, 8192, seed=1, steps=2))
        events = []
        while not engine.idle:
            events += engine.tick()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [event.row_id for event in events if isinstance(event, RowFailed)] == ["huge"]
    assert "small" in {event.row_id for event in events if isinstance(event, RowFinished | RowHandedBack)}


def test_a_worker_shows_the_memory_of_its_gpu(
    models: Mapping[str, LatentDiffusion], resident: ResidentModel, tmp_path: Path
) -> None:
    shown = WorkerMetrics()
    engine = Engine({BASE: resident}, buckets=(4,), batching="exact", capacity=1e9)
    shown.watch(engine, [(base_card(), models[BASE])], Store(f"file:{tmp_path}"))
    allocated, reserved, total = (
        shown.registry.get_sample_value(metrics.DEVICE_MEMORY.name, {"device": "cuda:0", "kind": kind}) or 0
        for kind in ("allocated", "reserved", "total")
    )
    weights = sum(one.nbytes for one in models[BASE].unet.parameters())
    assert weights <= allocated <= reserved <= total
