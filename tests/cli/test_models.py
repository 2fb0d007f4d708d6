"""`darkroom models`: what it makes workers can load, what it removes is its own, and nothing is left half-done."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cli.main import app
from contract.card import ModelCard
from contract.spec import Task
from models.weights_io.digest import weights_digest
from tests.models.original_files import make, write, write_tokenizers
from tests.tiny_models import BASE, UPSCALER, save_tiny_models
from worker.main import load


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders without a card, and single files; read, never written."""
    folder = tmp_path_factory.mktemp("published")
    save_tiny_models(folder)
    for name in (BASE, UPSCALER):
        (folder / name / "card.json").unlink()
    write_tokenizers(folder)
    write({key: tensor.half() for key, tensor in make("sd2").tensors.items()}, folder / "sd2.safetensors")
    torch.save({"state_dict": make("celeba").tensors, "epoch": 3}, folder / "celeba.ckpt")
    write(make("celeba").tensors, folder / "celeba.safetensors")
    return folder


def run(model_dir: Path, *arguments: object, ok: bool = True) -> Result:
    command = ["models", *map(str, arguments), "--model-dir", str(model_dir)]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert (done.exit_code == 0) == ok, done.output
    return done


def message(done: Result) -> str:
    return re.sub(r"\s+", " ", done.stderr.replace("│", ""))


def test_a_folder_is_referred_to(published: Path, tmp_path: Path) -> None:
    before = sorted(published.rglob("*"))
    done = run(tmp_path, "add", published / BASE, "--name", "mine")
    assert "reference to" in done.stdout
    assert (tmp_path / "mine" / "unet").resolve() == (published / BASE / "unet").resolve()
    served = load(tmp_path / "mine")
    assert served.card.tasks == (Task.TXT2IMG, Task.IMG2IMG, Task.INPAINT)
    assert (served.card.default_width, served.card.max_width, served.card.latent_downsample) == (64, 128, 8)
    assert served.card.digest == weights_digest(published / BASE)
    assert "reference to" in run(tmp_path, "list").stdout
    assert run(tmp_path, "remove", "mine").stdout == "mine: removed\n"
    assert not (tmp_path / "mine").exists()
    assert sorted(published.rglob("*")) == before


def test_a_folder_is_copied(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published / UPSCALER, tmp_path / "source")
    run(tmp_path, "add", source, "--name", "mine", "--copy", "--steps", "7", "--guidance", "1.5")
    shutil.rmtree(source)
    card = load(tmp_path / "mine").card
    assert (card.tasks, card.upscale_factor) == ((Task.UPSCALE,), 4)
    assert (card.default_steps, card.default_guidance) == ({Task.UPSCALE: 7}, {Task.UPSCALE: 1.5})
    assert (card.default_noise_level, card.max_noise_level) == (20, 349)
    weights = "unet/diffusion_pytorch_model.safetensors"
    expected = load_file(published / UPSCALER / weights)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(tmp_path / "mine" / weights).items())
    run(tmp_path, "remove", "mine")
    assert not (tmp_path / "mine").exists()


def test_a_card_beside_the_model_is_kept(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published / BASE, tmp_path / "source")
    run(tmp_path, "add", source, "--name", "first")
    card = json.loads((tmp_path / "first" / "card.json").read_text())
    (source / "card.json").write_text(json.dumps({**card, "description": "cats", "max_width": 640}))
    run(tmp_path, "add", source, "--name", "second")
    kept = load(tmp_path / "second").card
    assert (kept.name, kept.description, kept.max_width) == ("second", "cats", 640)


def test_single_files_become_folders(published: Path, tmp_path: Path) -> None:
    """Each tensor in its own type; what keys cannot tell is asked for."""
    arguments = ("add", published / "sd2.safetensors", "--tokenizer", published / "clip")
    done = run(tmp_path, *arguments, "--name", "large")
    assert "2.1-base and sd-turbo need --prediction-type epsilon" in message(done)
    done = run(tmp_path, *arguments, "--name", "small", "--prediction-type", "epsilon")
    assert done.stderr == ""
    large, small = load(tmp_path / "large"), load(tmp_path / "small")
    assert large.model.schedule.config.prediction_type == "v_prediction"
    assert small.model.schedule.config.prediction_type == "epsilon"
    assert (large.card.default_width, small.card.default_width) == (768, 512)
    assert small.card.max_tokens == 12
    stored = load_file(tmp_path / "small" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_pickled_checkpoints_are_converted(published: Path, tmp_path: Path) -> None:
    for suffix in ("ckpt", "safetensors"):
        assert "converted from" in run(tmp_path, "add", published / f"celeba.{suffix}", "--name", suffix).stdout
    one, other = (load(tmp_path / name) for name in ("ckpt", "safetensors"))
    assert one.card.conditioning == "none"
    assert one.card.digest == other.card.digest != ""
    assert torch.equal(one.model.unet.conv_out.weight, make("celeba").tensors["model.diffusion_model.out.2.weight"])


def test_pickled_folders_are_converted(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published / BASE, tmp_path / "source")
    for part, pickled in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        path = next((source / part).glob("*.safetensors"))
        torch.save(load_file(path), source / part / f"{pickled}.bin")
        path.unlink()
    assert "converted from" in run(tmp_path, "add", source, "--name", "mine").stdout
    expected = load_file(published / BASE / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(load(tmp_path / "mine").model.unet.conv_out.weight, expected["conv_out.weight"])


class Touch:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def test_what_cannot_be_added_leaves_nothing(published: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "models"
    model_dir.mkdir()

    def fails(path: Path, expected: str, *more: object, name: str = "mine") -> None:
        assert expected in message(run(model_dir, "add", path, "--name", name, *more, ok=False))
        assert list(model_dir.iterdir()) == []

    marker, code = tmp_path / "marker", tmp_path / "code.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "code": Touch(marker)}, code)
    fails(code, "holds code")
    assert not marker.exists()
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((published / "celeba.safetensors").read_bytes()[:-9])
    fails(truncated, "no whole safetensors file")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, "model_index.json cannot be read")
    fails(published / "sd2.safetensors", "--tokenizer")
    fails(published / BASE, "folders say these", "--prediction-type", "epsilon")
    fails(published / BASE, "cannot be a model's name", name="../mine")
    broken = shutil.copytree(published / BASE, tmp_path / "broken")
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    fails(broken, "no whole safetensors file")
    fails(broken, "no whole safetensors file", "--copy")


def test_a_name_in_use(published: Path, tmp_path: Path) -> None:
    run(tmp_path, "add", published / "celeba.safetensors", "--name", "mine")
    before = weights_digest(tmp_path / "mine")
    done = run(tmp_path, "add", published / BASE, "--name", "mine", ok=False)
    assert "choose another name, or `darkroom models remove mine` first" in message(done)
    assert weights_digest(tmp_path / "mine") == before


def test_only_what_was_added_is_removed(published: Path, tmp_path: Path) -> None:
    save_tiny_models(tmp_path)
    assert "was not made by" in message(run(tmp_path, "remove", BASE, ok=False))
    assert "was not made by" in message(run(tmp_path, "remove", f"../{tmp_path.name}/{BASE}", ok=False))
    assert (tmp_path / BASE / "unet").is_dir()
    run(tmp_path, "add", published / BASE, "--name", "mine")
    (tmp_path / "mine" / "calibration.json").write_text("{}")
    (tmp_path / "mine" / "loras").mkdir()
    (tmp_path / "mine" / "loras" / "ink.safetensors").write_text("mine")
    assert "loras stays in" in run(tmp_path, "remove", "mine").stdout
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["loras", "ink.safetensors"]


def test_models_are_inspected(published: Path, tmp_path: Path) -> None:
    told = run(tmp_path, "inspect", published / "sd2.safetensors").stdout
    for part in ("Stable Diffusion 2", "open_clip", "v_prediction assumed", "tokenizer", "(64, 128, 128)"):
        assert part in told
    told = run(tmp_path, "inspect", published / "celeba.ckpt").stdout
    for part in ("pickled", "CelebA", "averaged weights: none"):
        assert part in told
    run(tmp_path, "add", published / BASE, "--name", "mine")
    for target in ("mine", published / BASE):
        told = run(tmp_path, "inspect", target).stdout
        for part in ("StableDiffusionInpaintPipeline", "txt2img, img2img, inpaint", "a prompt", "64x64", "float32"):
            assert part in told
    assert "no such file or folder" in message(run(tmp_path, "inspect", "nothing", ok=False))


def test_cards_say_what_each_family_takes(published: Path, tmp_path: Path) -> None:
    """The gateway validates requests against them."""
    expected = {
        "class": ("class", 5, {"txt2img": 20}, {"txt2img": 3.0}),
        "layout": ("layout", 65, {"txt2img": 50}, {"txt2img": 1.0}),
        "semantic": ("semantic", 7, {"txt2img": 50}, {"txt2img": 1.0}),
        "super resolution": ("none", None, {"upscale": 100}, {"upscale": 1.0}),
        "sdxl": ("text", None, {"txt2img": 50}, {"txt2img": 5.0}),
    }
    for number, (name, (conditioning, classes, steps, guidance)) in enumerate(expected.items()):
        path = write(make(name).tensors, tmp_path / "model.safetensors")
        run(tmp_path, "add", path, "--name", f"model-{number}", "--tokenizer", published / "clip")
        card = ModelCard.model_validate_json((tmp_path / f"model-{number}" / "card.json").read_bytes())
        assert (card.conditioning, card.classes) == (conditioning, classes)
        assert steps.items() <= card.default_steps.items()
        assert guidance.items() <= card.default_guidance.items()
        assert card.max_objects == (4 if conditioning == "layout" else None)


@pytest.mark.parametrize(
    "note",
    [
        '{"kind": "converted from", "source": "x", "entries": [".."]}',
        '{"kind": "converted from", "source": "x", "entries": ["unet/../../other"]}',
        '{"kind": "converted from", "entries": []}',
        "[]",
        "not JSON",
    ],
)
def test_a_note_that_add_cannot_have_written_removes_nothing(note: str, tmp_path: Path) -> None:
    """It may have come with a downloaded folder."""
    for name in ("mine", "other"):
        (tmp_path / name / "unet").mkdir(parents=True)
    (tmp_path / "mine" / "added.json").write_text(note)
    before = sorted(tmp_path.rglob("*"))
    assert "is not what `darkroom models add` writes" in message(run(tmp_path, "remove", "mine", ok=False))
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_names_that_lead_out_are_not_followed(published: Path, tmp_path: Path) -> None:
    run(tmp_path / "models", "add", published / "celeba.safetensors", "--name", "mine")
    outside = (tmp_path / "models" / "mine").rename(tmp_path / "outside")
    (tmp_path / "models" / "mine").symlink_to(outside)
    (tmp_path / "added.json").write_text('{"kind": "converted from", "source": "x", "entries": ["outside"]}')
    for name in ("mine", "..", "."):
        assert "was not made by" in message(run(tmp_path / "models", "remove", name, ok=False))
    assert (outside / "unet").is_dir()


def test_models_that_are_being_added_are_not_listed(tmp_path: Path) -> None:
    save_tiny_models(tmp_path)
    before = run(tmp_path, "list").stdout
    shutil.copytree(tmp_path / BASE, tmp_path / ".half.abc")
    assert run(tmp_path, "list").stdout == before


def test_a_broken_card_is_named(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published / BASE, tmp_path / "source")
    (source / "card.json").write_text('{"name": "x"}')
    for command in (("add", source, "--name", "mine"), ("inspect", source)):
        assert "is no model card" in message(run(tmp_path / "models", *command, ok=False))
    assert "is no model card" in message(run(tmp_path, "list", ok=False))


def test_a_folder_whose_parts_do_not_fit_is_refused_in_words(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published / BASE, tmp_path / "source")
    path = source / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_num_groups": 3}))
    assert "cannot be split into norm_num_groups=3" in message(run(tmp_path, "add", source, "--name", "a", ok=False))
