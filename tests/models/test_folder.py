"""Folders that diffusers wrote, folders that it reads, and folders that are broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import UNetConfig, UnsupportedStructure
from models.latent_diffusion import LatentDiffusion
from models.unet import UNet
from models.weights_io.folder import save_folder
from models.weights_io.tensors import WeightsError
from tests.models.small import diffusers

KINDS = {
    "text_model": diffusers.StableDiffusionPipeline,
    "inpainter": diffusers.StableDiffusionInpaintPipeline,
    "upscaler": diffusers.StableDiffusionUpscalePipeline,
}
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_model_index_names_the_pipeline(
    kind: str, folder_of: Callable[[LatentDiffusion], Path], request: pytest.FixtureRequest
) -> None:
    """`DiffusionPipeline` picks its class from the folder alone."""
    folder = folder_of(request.getfixturevalue(kind))
    assert type(diffusers.DiffusionPipeline.from_pretrained(folder)) is KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_diffusers_is_read(
    kind: str,
    pipeline_of: Callable[[LatentDiffusion, type[Any]], Any],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Theirs writes every field of every config, and text encoder keys as transformers 5 has them."""
    model: LatentDiffusion = request.getfixturevalue(kind)
    pipeline_of(model, KINDS[kind]).save_pretrained(tmp_path)
    loaded = LatentDiffusion.load(tmp_path)
    assert loaded.tasks == model.tasks
    assert loaded.unet.config == model.unet.config
    assert loaded.autoencoder.config == model.autoencoder.config
    assert loaded.schedule.config == model.schedule.config
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    if model.low_res_schedule is not None:
        assert loaded.low_res_schedule is not None
        assert torch.equal(loaded.low_res_schedule.alphas_cumprod, model.low_res_schedule.alphas_cumprod)


def test_half_precision_on_disk_is_full_precision_in_memory(inpainter: LatentDiffusion, tmp_path: Path) -> None:
    save_folder(inpainter, tmp_path)
    assert load_file(tmp_path / UNET_WEIGHTS)["conv_in.weight"].dtype == torch.float16
    loaded = LatentDiffusion.load(tmp_path)
    expected = inpainter.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key].half().float())


@pytest.fixture
def folder(inpainter: LatentDiffusion, tmp_path: Path) -> Path:
    save_folder(inpainter, tmp_path)
    return tmp_path


def load_fails(folder: Path, *parts: str) -> None:
    with pytest.raises(WeightsError) as caught:
        LatentDiffusion.load(folder)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS])
class TestBrokenWeights:
    def test_missing(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        load_fails(folder, name, "cannot be read")

    @pytest.mark.parametrize("kept", [0, 4, 200, -8])
    def test_truncated(self, folder: Path, name: str, kept: int) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:kept])
        load_fails(folder, name, "no whole safetensors file")

    def test_text(self, folder: Path, name: str) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
        load_fails(folder, name, "no whole safetensors file")

    def test_keys(self, folder: Path, name: str) -> None:
        """Every missing, unexpected and misshapen key is named at once."""
        weights = load_file(folder / name)
        missing, misshapen = sorted(weights)[:2]
        del weights[missing]
        weights[misshapen] = torch.zeros(3, 1)
        weights["stray.weight"] = torch.zeros(2)
        save_file(weights, folder / name)
        missing, misshapen = missing.removeprefix("text_model."), misshapen.removeprefix("text_model.")
        load_fails(folder, name, f"missing {missing}", f"{misshapen} is [3, 1], expected [", "unexpected stray.weight")


CONFIGS = ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("name", [*CONFIGS, "text_encoder/config.json"])
def test_broken_configs(folder: Path, name: str) -> None:
    (folder / name).write_text("[1, 2]")
    load_fails(folder, name, "list, expected an object")
    (folder / name).write_text('{"a": ')
    load_fails(folder, name, "is not JSON")
    (folder / name).write_bytes(b"\xff\xfe\x00")
    load_fails(folder, name, "is not JSON")
    (folder / name).unlink()
    load_fails(folder, name, "cannot be read")


def test_broken_tokenizers(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    assert {path.name for path in tokenizer.iterdir()} >= {"tokenizer.json", "vocab.json", "merges.txt"}
    (tokenizer / "tokenizer.json").write_text('{"version": ')
    load_fails(folder, "tokenizer.json is not JSON")
    (tokenizer / "tokenizer.json").write_text('{"version": "7"}')
    load_fails(folder, "no CLIP tokenizer can be read")
    (tokenizer / "tokenizer.json").unlink()
    LatentDiffusion.load(folder)  # vocab.json and merges.txt, the older layout, are enough
    (tokenizer / "merges.txt").unlink()
    load_fails(folder, "merges.txt is missing")
    (tokenizer / "vocab.json").unlink()
    load_fails(folder, "vocab.json cannot be read")


def test_a_tokenizer_larger_than_the_text_encoder(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    load_fails(folder, "58 tokens and 77 places", "only 58 and 12")


def test_no_folder_at_all(tmp_path: Path) -> None:
    load_fails(tmp_path / "nowhere", "model_index.json", "cannot be read")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 5}, "in_channels=5; expected 4 or 9"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8; expected 16"),
        ({"out_channels": 3}, "out_channels=3; expected 4"),
        ({"num_class_embeds": 4}, "an upscaler, and no other model"),
    ],
)
def test_parts_that_do_not_fit_one_another(
    inpainter: LatentDiffusion, folder: Path, changes: dict[str, Any], message: str
) -> None:
    unet = UNet(UNetConfig(**{**vars(inpainter.unet.config), **changes}))
    (folder / "unet" / "config.json").write_text(json.dumps(unet.config.to_dict()))
    save_file(unet.state_dict(), folder / UNET_WEIGHTS)
    with pytest.raises(UnsupportedStructure, match=message):
        LatentDiffusion.load(folder)
