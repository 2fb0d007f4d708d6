"""All stages of the recipe, tiny, through the command; what they leave is a pair of models that draw."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from contract.card import ModelCard
from contract.spec import Task
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from models.text import TextConditioner
from training.data.sprites import find_font
from training.diffusion import new_denoiser
from training.gate import GateResult, gate, gate_of_runs, swap_object
from training.latents import read_latents
from training.plot import read_log
from training.tokenizer import caption_words

TINY = {
    "pictures": 32,
    "latents": 32,
    "masked_latents": 8,
    "upscaler_latents": 8,
    "first_stage.batch": 2,
    "x4_batch": 2,
    "second_stage.batch": 6,
    "upscaler_stage.batch": 2,
    "autoencoder.steps": 5,
    "autoencoder_x4.steps": 5,
    "diffusion.steps": 5,
    "upscaler.steps": 5,
}


def train(runs: Path, *arguments: str) -> str:
    changes = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(app, ["train", *arguments, "--quick", "--runs", str(runs), *changes])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_font()  # the command itself would answer with a message
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "all")
    return folder


def test_every_stage_leaves_a_state_and_a_log(runs: Path) -> None:
    for stage in ("autoencoder", "autoencoder-x4", "diffusion", "upscaler"):
        state = torch.load(runs / stage / "state.pt", weights_only=True)
        assert set(state) == {"module", "averaged", "optimiser", "step"}
        assert state["step"] == 5
        log = read_log(runs / stage / "log.csv")
        assert log["step"] == [5]
        assert np.isfinite([log[name] for name in log]).all()
    assert (runs / "losses.png").exists()


def test_the_models_have_valid_cards(runs: Path) -> None:
    cards = [
        ModelCard.model_validate_json((runs / "weights" / name / "card.json").read_text())
        for name in ("darkroom-small", "darkroom-small-x4")
    ]
    assert cards[0].tasks == (Task.TXT2IMG, Task.IMG2IMG, Task.INPAINT)
    assert cards[1].tasks == (Task.UPSCALE,)
    assert cards[0].vocabulary.words == tuple(caption_words())
    assert cards[0].digest != cards[1].digest
    for card in cards:
        model = LatentDiffusion.load(runs / "weights" / card.name)
        assert model.tasks == {task.value for task in card.tasks}
        assert isinstance(model.conditioner, TextConditioner)
        assert model.conditioner.max_tokens == card.max_tokens
        assert model.max_noise_level == (card.max_noise_level or 0)


def test_the_models_draw(runs: Path) -> None:
    small = LatentDiffusion.load(runs / "weights" / "darkroom-small")
    request = PictureRequest("txt2img", "a pizza on a blue background", 64, 64, seed=3, steps=2)
    picture = small.render(request)
    assert picture.size == (64, 64)
    assert np.asarray(picture).std() > 0
    assert picture.tobytes() == small.render(request).tobytes()
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    hole = PictureRequest("inpaint", "a red heart", 64, 64, seed=3, steps=2, image=picture, mask=mask)
    assert np.array_equal(np.asarray(small.render(hole))[:16], np.asarray(picture)[:16])
    large = LatentDiffusion.load(runs / "weights" / "darkroom-small-x4")
    upscale = PictureRequest("upscale", "", 256, 256, seed=3, steps=2, guidance_scale=1.0, image=picture)
    assert large.render(upscale).size == (256, 256)


def test_what_is_done_is_not_done_again(runs: Path) -> None:
    """Repeating the command writes the same models, and trains no further."""
    paths = [*runs.rglob("card.json"), runs / "autoencoder" / "state.pt", *runs.glob("*/log.csv")]
    before = {path: path.read_bytes() for path in paths}
    train(runs, "all")
    assert {path: path.read_bytes() for path in paths} == before


def test_the_same_recipe_makes_the_same_model(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "latents-x4").symlink_to(runs / "latents-x4")
    (tmp_path / "autoencoder-x4").symlink_to(runs / "autoencoder-x4")
    (tmp_path / "tokenizer").symlink_to(runs / "tokenizer")
    train(tmp_path, "upscaler")
    digest = json.loads((tmp_path / "weights/darkroom-small-x4/card.json").read_text())["digest"]
    assert digest == json.loads((runs / "weights/darkroom-small-x4/card.json").read_text())["digest"]


def test_stages_name_the_one_that_they_need(tmp_path: Path) -> None:
    for stage, needed in (("autoencoder", "darkroom train data"), ("diffusion", "darkroom train autoencoder")):
        done = CliRunner().invoke(app, ["train", stage, "--quick", "--runs", str(tmp_path)], env={"COLUMNS": "300"})
        assert done.exit_code == 1
        assert needed in done.stderr


def test_another_dataset_in_the_folder_is_refused(runs: Path) -> None:
    done = CliRunner().invoke(app, ["train", "data", "--quick", "--runs", str(runs)], env={"COLUMNS": "500"})
    assert done.exit_code == 1
    assert "choose another folder or delete this one" in done.stderr


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a pizza on a blue background", r"an? (?!pizza)\w+ on a blue background"),
        ("an octopus, pink background", r"an? (?!octopus)\w+, pink background"),
        ("two red hearts at the top left", r"two red (circles|squares|triangles|stars|diamonds) at the top left"),
        ("strawberries", r"(?!strawberries)(\w+s|fish)"),
        ("a cat and a dog", r"an? (?!cat)\w+ and a dog"),
    ],
)
def test_the_gate_swaps_the_object(caption: str, expected: str) -> None:
    for seed in range(20):
        assert swap_object(caption, np.random.default_rng(seed)) != caption
        assert_matches(swap_object(caption, np.random.default_rng(seed)), expected)


def assert_matches(text: str | None, pattern: str) -> None:
    assert text is not None
    assert re.fullmatch(pattern, text), text


def test_the_gate_leaves_captions_of_several_objects_out() -> None:
    assert swap_object("a cat and a pizza on a red background", np.random.default_rng(0)) is None
    assert swap_object("a blue background", np.random.default_rng(0)) is None


def test_a_new_model_does_not_listen_to_words(runs: Path) -> None:
    result = gate_of_runs(runs, pictures=16)
    assert result.step == 5
    assert result == gate_of_runs(runs, pictures=16)
    assert not result.listens
    assert GateResult(step=30_000, pictures=256, right=0.3089, swapped=0.3255, error=0.002).listens
    done = CliRunner().invoke(app, ["train", "gate", "--runs", str(runs), "--pictures", "16"])
    assert done.exit_code == 1
    assert "does not listen" in done.output


def test_the_gate_needs_captions_of_one_object(runs: Path, tmp_path: Path) -> None:
    latents = read_latents(runs / "latents")
    latents.captions[:] = ["a cat and a pizza"] * len(latents.captions)
    with pytest.raises(ValueError, match="expected at least 2"):
        gate(new_denoiser(runs / "tokenizer", 0), latents)
    done = CliRunner().invoke(app, ["train", "gate", "--runs", str(tmp_path)], env={"COLUMNS": "300"})
    assert done.exit_code == 1
    assert "darkroom train diffusion" in done.stderr
