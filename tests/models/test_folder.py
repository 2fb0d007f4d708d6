"""Folders that diffusers wrote, folders that it reads, and folders that are broken."""

import copy
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


def assert_same(loaded: LatentDiffusion, expected: LatentDiffusion) -> None:
    weights = expected.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[key].half().float()), key


def split(path: Path, index: str, shard: str = "{stem}-0000{number}-of-00003.safetensors") -> None:
    """Into three shards, as `save_pretrained(max_shard_size=...)` does."""
    weights = load_file(path)
    stem = path.name.split(".")[0]
    names = [shard.format(stem=stem, number=number + 1) for number in range(3)]
    weight_map = {key: names[number % 3] for number, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key, at in weight_map.items() if at == name}, path.with_name(name))
    path.with_name(index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    path.unlink()


def test_shards(inpainter: LatentDiffusion, folder: Path) -> None:
    for name in (UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS):
        split(folder / name, f"{Path(name).name}.index.json")
    assert_same(LatentDiffusion.load(folder), inpainter)


@pytest.mark.parametrize("index", ["{stem}.safetensors.index.fp16.json", "{stem}.safetensors.fp16.index.json"])
def test_shards_of_a_variant(inpainter: LatentDiffusion, folder: Path, index: str) -> None:
    stem = Path(UNET_WEIGHTS).stem
    split(folder / UNET_WEIGHTS, index.format(stem=stem), "{stem}.fp16-0000{number}-of-00003.safetensors")
    assert_same(LatentDiffusion.load(folder), inpainter)


def test_broken_shards(folder: Path) -> None:
    index = folder / f"{UNET_WEIGHTS}.index.json"
    split(folder / UNET_WEIGHTS, index.name)
    text = index.read_text()
    index.write_text(text.replace("diffusion_pytorch_model-00001", "../../diffusion_pytorch_model-00001"))
    load_fails(folder, "expected files of its own folder")
    index.write_text(json.dumps({"weight_map": {**json.loads(text)["weight_map"], "stray": "a.safetensors"}}))
    load_fails(folder, "a.safetensors", "cannot be read")
    shard = "diffusion_pytorch_model-00001-of-00003.safetensors"
    index.write_text(json.dumps({"weight_map": {**json.loads(text)["weight_map"], "stray": shard}}))
    load_fails(folder, "promises stray")
    index.write_text("{}")
    load_fails(folder, "has no weight_map")
    index.write_text(text)
    (folder / "unet" / shard).unlink()
    load_fails(folder, shard, "cannot be read")


def test_variants(inpainter: LatentDiffusion, folder: Path) -> None:
    """The plain file wins, then fp16, then the only one there is."""
    for name in (UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS):
        path = folder / name
        other = path.with_name(path.name.replace(".safetensors", ".non_ema.safetensors"))
        other.write_text("not read")
        fp16 = path.with_name(path.name.replace(".safetensors", ".fp16.safetensors"))
        fp16.write_text("not read")
        assert_same(LatentDiffusion.load(folder), inpainter)
        path.rename(fp16)
        assert_same(LatentDiffusion.load(folder), inpainter)
        fp16.rename(other)
        assert_same(LatentDiffusion.load(folder), inpainter)
        other.with_name(other.name.replace("non_ema", "bf16")).write_text("which?")
        load_fails(folder, "several variants", "bf16", "non_ema")
        other.with_name(other.name.replace("non_ema", "bf16")).unlink()


def test_names_and_shapes_of_old_folders(inpainter: LatentDiffusion, folder: Path) -> None:
    """Before diffusers 0.13; and autoencoders whose attention was stored as convolutions."""
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(folder / VAE_WEIGHTS)
    attention = [key for key in weights if ".attentions." in key and "group_norm" not in key]
    assert len(attention) == 16
    for key in attention:
        weight = weights.pop(key)
        new = next(key.replace(present, old) for present, old in names.items() if present in key)
        weights[new] = weight[:, :, None, None] if weight.dim() == 2 else weight
    save_file(weights, folder / VAE_WEIGHTS)
    assert_same(LatentDiffusion.load(folder), inpainter)


@pytest.mark.parametrize(("part", "pickled"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_pickles_are_named_but_not_read(folder: Path, part: str, pickled: str) -> None:
    next((folder / part).glob("*.safetensors")).unlink()
    (folder / part / f"{pickled}.bin").write_bytes(b"\x80\x04.")
    load_fails(folder, part, f"{pickled}.bin, a pickle", "darkroom models add")


def test_long_lists_of_keys_are_cut(folder: Path) -> None:
    weights = load_file(folder / UNET_WEIGHTS)
    save_file({f"model.{key}": weight for key, weight in weights.items()}, folder / UNET_WEIGHTS)
    with pytest.raises(WeightsError, match=f"; and {2 * len(weights) - 20} more$") as caught:
        LatentDiffusion.load(folder)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(folder: Path, dtype: torch.dtype) -> None:
    loaded = LatentDiffusion.load(folder, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert not any(buffer.is_meta for buffer in loaded.buffers())


def test_a_file_in_use_can_be_written_again(inpainter: LatentDiffusion, tmp_path: Path) -> None:
    """A loaded model keeps the weights that it was loaded with."""
    save_folder(inpainter, tmp_path, dtype=torch.float32)
    loaded = LatentDiffusion.load(tmp_path)
    other = copy.deepcopy(inpainter)
    for parameter in other.parameters():
        parameter.data.zero_()
    save_folder(other, tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.unet.conv_out.weight, inpainter.unet.conv_out.weight)
    assert not LatentDiffusion.load(tmp_path).unet.conv_out.weight.any()


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
    load_fails(folder, "no CLIPTokenizer can be read")
    (tokenizer / "tokenizer.json").unlink()
    LatentDiffusion.load(folder)  # vocab.json and merges.txt, the older layout, are enough
    (tokenizer / "merges.txt").unlink()
    load_fails(folder, "merges.txt is missing")
    (tokenizer / "vocab.json").unlink()
    load_fails(folder, "vocab.json is missing")


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


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("unet/config.json", {"norm_num_groups": 3}, WeightsError),
        ("unet/config.json", {"act_fn": "gelu"}, UnsupportedStructure),
        ("vae/config.json", {"scaling_factor": "big"}, UnsupportedStructure),
        ("scheduler/scheduler_config.json", {"beta_start": -1}, WeightsError),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, UnsupportedStructure),
        ("text_encoder/config.json", {"num_attention_heads": 3}, WeightsError),
        ("text_encoder/config.json", {"vocab_size": "many"}, WeightsError),
        ("text_encoder/config.json", {"hidden_act": "tanh"}, UnsupportedStructure),
    ],
)
def test_configs_that_make_no_sense_are_named(
    folder: Path, name: str, changes: dict[str, Any], error: type[ValueError]
) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=f"{name}: .*"):
        LatentDiffusion.load(folder)


def test_quantised_weights(folder: Path) -> None:
    weights = load_file(folder / UNET_WEIGHTS)
    weights["conv_in.weight"] = weights["conv_in.weight"].to(torch.int8)
    save_file(weights, folder / UNET_WEIGHTS)
    load_fails(folder, UNET_WEIGHTS, "conv_in.weight is of type torch.int8; expected floating-point numbers")
