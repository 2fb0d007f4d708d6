"""`darkroom models add-lora` on a tiny model."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from models.latent_diffusion import LatentDiffusion
from tests.adapter_files import adapter_of, write_kohya, write_peft
from tests.tiny_models import BASE, UPSCALER, save_tiny_models
from worker.main import load


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


def add(model_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", "add-lora", *arguments, "--model-dir", str(model_dir)])


def test_added_adapters_are_on_the_card(model_dir: Path, tmp_path: Path) -> None:
    model = LatentDiffusion.load(model_dir / BASE)
    film = adapter_of(model, write_kohya, tmp_path / "film.safetensors", rank=3)
    result = add(model_dir, BASE, str(film))
    assert result.exit_code == 0, result.output
    told = result.output.replace("\n", "")
    assert "loras/film.safetensors" in told
    assert "rank 3" in told
    assert add(model_dir, BASE, str(film), "--name", "neon-2").exit_code == 0
    served = load(model_dir / BASE)
    assert served.card.loras == tuple(served.model.adapters) == ("film", "neon-2")
    again = add(model_dir, BASE, str(film))
    assert again.exit_code == 1
    assert "remove it, or choose another --name" in again.output.replace("\n", " ")


def test_what_is_refused_leaves_nothing_behind(model_dir: Path, tmp_path: Path) -> None:
    model = LatentDiffusion.load(model_dir / BASE)
    wrong = adapter_of(model, write_peft, tmp_path / "wrong.safetensors", pattern="conv_in")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(wrong.read_bytes()[:200])
    for arguments, message in (
        ((UPSCALER, str(wrong)), "conv_in is down"),
        ((BASE, str(cut)), "is no whole safetensors file"),
        ((BASE, str(wrong), "--name", "../up"), "is no name"),
        (("none", str(wrong)), "is missing"),
    ):
        result = add(model_dir, *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
    assert not (model_dir / UPSCALER / "loras").exists()
