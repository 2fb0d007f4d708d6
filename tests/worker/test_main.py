"""What happens before the first job: threads, folders, warm-up."""

import shutil
from pathlib import Path

import pytest
import torch

from contract.spec import Task
from tests.tiny_models import BASE, UPSCALER, base_card
from worker.engine.engine import Engine
from worker.main import ModelFolderError, buckets, load, pin_threads, warm_up


def test_buckets_are_powers_of_two_up_to_the_slots() -> None:
    assert {slots: buckets(slots) for slots in (1, 2, 6, 8)} == {1: (1,), 2: (1, 2), 6: (1, 2, 4, 6), 8: (1, 2, 4, 8)}


def test_threads_are_a_power_of_two() -> None:
    before = torch.get_num_threads()
    try:
        assert [pin_threads(wanted) for wanted in (1, 2, 3)] == [1, 2, 2]
        assert torch.get_num_threads() == 2
        assert pin_threads(None) <= 2
    finally:
        torch.set_num_threads(before)


def test_loaded_models_warm_up(model_dir: Path) -> None:
    served = {name: load(model_dir / name) for name in (BASE, UPSCALER)}
    engine = Engine({name: one.model for name, one in served.items()})
    warm_up(engine, served)
    assert engine.idle


def test_folders_that_cannot_be_served(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"other/card\.json is missing: expected a model folder with its card"):
        load(tmp_path / "other")
    folder = tmp_path / BASE
    shutil.copytree(model_dir / BASE, folder)
    (folder / "card.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="is no model card"):
        load(folder)
    tasks = (Task.UPSCALE,)
    changes = {"tasks": tasks, "default_steps": {Task.UPSCALE: 1}, "default_guidance": {Task.UPSCALE: 1.0}}
    card = base_card().model_copy(update={**changes, "upscale_factor": 4})
    (folder / "card.json").write_text(card.model_dump_json())
    with pytest.raises(ModelFolderError, match="promises upscale, which these weights cannot do"):
        load(folder)
    renamed = folder.rename(tmp_path / "renamed")
    with pytest.raises(ModelFolderError, match="is the card of tiny; expected that of renamed"):
        load(renamed)
