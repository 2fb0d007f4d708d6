"""`make bench-lora` on a tiny model: every kind of adapter runs and is compared with none."""

from pathlib import Path

import pytest
import torch

from benchmarks import lora
from benchmarks.engine import case
from tests.tiny_models import tiny_base
from worker.engine.calibration import Calibration


def test_a_tiny_model_is_measured_with_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(lora, "SHIPPED", "tiny")
    try:
        torch.set_num_threads(1)
        steps = lora.measure_case(case("tiny", tiny_base(tmp_path), 8, Calibration()), 1)
    finally:
        torch.set_num_threads(threads)
    assert steps.keys() == {"none", *lora.KINDS}
    assert all(seconds > 0 for seconds in steps.values())
    text = lora.as_table({"steps": {"tiny": steps}})
    assert "| none |" in text
    assert "1.00x" in text
