"""What happens before the first job: threads, folders, warm-up."""

import shutil
from pathlib import Path

import pytest

from contract.spec import Task
from tests.tiny_models import BASE, UPSCALER, base_card
from worker.engine.engine import Engine
from worker.main import ModelFolderError, load, warm_up


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
    (folder / "card.json").write_text(base_card().model_dump_json())
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace("CrossAttnDownBlock2D", "KDownBlock2D"))
    with pytest.raises(ModelFolderError, match=r"tiny: .*KDownBlock2D.* not supported"):
        load(folder)
    renamed = folder.rename(tmp_path / "renamed")
    with pytest.raises(ModelFolderError, match="is the card of tiny; expected that of renamed"):
        load(renamed)
