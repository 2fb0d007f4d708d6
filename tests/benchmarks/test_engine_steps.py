"""`make bench-engine`'s first part on a tiny model: every way runs, and the table tells its ratio."""

from pathlib import Path
from typing import Any

import torch

from benchmarks import engine
from tests.tiny_models import tiny_base
from worker.engine.calibration import Calibration


def test_a_tiny_model_is_measured_in_every_way(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = engine.case("tiny", tiny_base(tmp_path), 8, Calibration())
        figures: dict[str, Any] = {
            "steps": {"tiny": engine.measure_steps(one, 1)},
            "savings": {"tiny": engine.measure_savings(one, "float32", 1)},
            "batching": {"tiny": engine.measure_batching(one, "float32", 1)},
            "parameters": {"tiny": 1_000_000},
        }
    finally:
        torch.set_num_threads(threads)
    text = engine.as_table(figures)
    assert "| diffusers float32 |" in text
    assert all(seconds > 0 for batch in figures["steps"]["tiny"].values() for seconds in batch.values())
    assert len(figures["savings"]["tiny"]) == 6
    assert "| exact, only the full batch |" in text
