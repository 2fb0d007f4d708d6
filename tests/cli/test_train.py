"""`darkroom train`: the recipe can be changed by name, and the logs can be drawn."""

from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from cli.train import changed
from training.recipe import Recipe


def test_numbers_of_the_recipe_change_by_name() -> None:
    recipe = changed(changed(Recipe(), "pictures=64"), "diffusion.steps=5")
    assert (recipe.pictures, recipe.diffusion.steps) == (64, 5)
    assert recipe.upscaler == Recipe().upscaler
    with pytest.raises(typer.BadParameter, match=r"is not in the recipe; expected one of .*pictures"):
        changed(Recipe(), "paintings=64")
    with pytest.raises(typer.BadParameter, match="expected NAME=NUMBER"):
        changed(Recipe(), "pictures=many")


def test_losses_are_drawn(tmp_path: Path) -> None:
    for stage in ("autoencoder", "diffusion"):
        (tmp_path / stage).mkdir()
        lines = ["step,unix_time,lr,loss,l1", *(f"{step},0,0.001,{1 / step},{0.5 / step}" for step in (50, 100, 150))]
        (tmp_path / stage / "log.csv").write_text("\n".join(lines))
    done = CliRunner().invoke(app, ["train", "plot", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "losses.png") as image:
        image.load()
        assert image.width > image.height


def test_nothing_trained_yet(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "plot", "--runs", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "train a stage first" in done.stderr


def test_evaluate_takes_the_options_of_the_score() -> None:
    """Its help is that of benchmarks.score."""
    done = CliRunner().invoke(app, ["train", "evaluate", "--help"])
    assert done.exit_code == 0
    assert "--upscaled-side" in done.stdout
