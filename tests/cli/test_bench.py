"""`darkroom bench calibrate` on tiny models."""

from pathlib import Path

import torch
from typer.testing import CliRunner

from cli.bench import lanes_of
from cli.main import app
from cli.model_cards import card_of
from tests.models.families import family
from tests.tiny_models import BASE, UPSCALER, save_tiny_models
from worker.batch_worker import ServedModel
from worker.engine.calibration import Calibration
from worker.engine.numerics import device_kind


def test_calibrate_writes_what_workers_read(tmp_path: Path) -> None:
    save_tiny_models(tmp_path)
    threads = torch.get_num_threads()
    try:
        command = ["bench", "calibrate", "--model-dir", str(tmp_path), "--models", f"{BASE},{UPSCALER}"]
        result = CliRunner().invoke(app, [*command, "--threads", "1", "--slots", "2", "--rounds", "1"])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    for name, lanes in ((BASE, {"8x8", "8x8 guided"}), (UPSCALER, {"16x16", "16x16 guided"})):
        entry = Calibration.read(tmp_path / name).devices[device_kind(torch.device("cpu"))]
        assert entry.threads == 1
        assert all(one.buckets.keys() == lanes for one in entry.measured.values())
        assert f"{name} on cpu" in result.output


def test_models_that_cannot_be_guided_have_one_lane() -> None:
    lanes = {name: lanes_of(ServedModel(card_of(family(name), name), family(name))) for name in ("class", "celeba")}
    assert {name: [lane.label for lane in found] for name, found in lanes.items()} == {
        "class": ["8x8 guided", "8x8"],
        "celeba": ["8x8"],
    }


def test_a_folder_without_model_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "calibrate", "--model-dir", str(tmp_path), "--models", "none"])
    assert result.exit_code == 2
    assert "is missing" in result.output
