"""Files in the original layout, against the original's own arrangement of modules and against diffusers' converters."""

from __future__ import annotations

import functools
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.class_label import ClassEncoder
from models.conditioning import Encoded
from models.config import UnsupportedStructure
from models.latent_diffusion import LatentDiffusion
from models.text import TextConditioner, TextEncoder
from models.text_pair import TextPairEncoder
from models.weights_io.files import Reading
from models.weights_io.folder import save_folder
from models.weights_io.load import load_parts
from models.weights_io.single_file import Told
from models.weights_io.tensors import WeightsError
from tests.models import original_files
from tests.models.original_files import (
    CASES,
    CONTEXT,
    SINUSOIDS,
    Original,
    token_ids,
    tokenizer_of,
    write,
    write_tokenizers,
)

diffusers: Any = importlib.import_module("diffusers")
convert: Any = importlib.import_module("diffusers.loaders.single_file_utils")
TOLERANCE = 5e-5
make = functools.cache(original_files.make)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder)
    return folder


def told(name: str, tokenizers: Path, **more: Any) -> Told:
    return Told(tokenizer=tokenizer_of(name, tokenizers), **more)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def pair_of(theirs: Any, encoder: TextPairEncoder, prompt: str) -> Encoded:
    """What SDXL's original modules make of a prompt."""
    clip, open_clip = theirs["embedders"][0]["transformer"]["text_model"], theirs["embedders"][1]["model"]
    hidden = clip(token_ids(encoder.tokenizer, prompt, encoder.max_tokens), output_hidden_states=True).hidden_states
    ids = token_ids(encoder.tokenizer_2, prompt, encoder.max_tokens)
    return Encoded(torch.cat([hidden[-2], open_clip.penultimate(ids)], dim=-1), open_clip.pooled(ids))


def sinusoids(numbers: Tensor) -> Tensor:
    half = SINUSOIDS // 2
    angles = numbers[..., None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)


def vectors_of(original: Original, model: LatentDiffusion) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of two rows: the vector that SDXL's original UNet embeds beside the timestep, and what ours adds for it."""
    encoder = model.conditioner
    if not isinstance(encoder, TextPairEncoder):
        return None, None
    pooled = pair_of(original.conditioner, encoder, "dog").pooled
    found = encoder.encode_with_pooled("dog").pooled
    assert pooled is not None
    assert found is not None
    assert_close(found, pooled)
    sizes = torch.tensor([[128, 64, 0, 0, 128, 64]] * 2)
    addition = model.addition(found.repeat(2, 1), torch.zeros(1, 4, 128 // 8, 64 // 8))
    assert addition is not None
    return torch.cat([pooled.repeat(2, 1), sinusoids(sizes)], dim=-1), addition


def context_of(original: Original, model: LatentDiffusion) -> Tensor | None:
    """Also compares what the conditioners make of the same input."""
    encoder = model.conditioner
    if encoder is None or original.conditioner is None:
        return None
    theirs: Any = original.conditioner
    if isinstance(encoder, TextPairEncoder):
        context: Tensor = pair_of(theirs, encoder, "a cat").context
        ours = encoder.encode("a cat")
    elif isinstance(encoder, ClassEncoder):
        context = theirs["embedding"](torch.tensor([[2]]))
        ours = encoder.encode(2)
    elif isinstance(encoder, TextConditioner):
        ids = token_ids(encoder.tokenizer, "a cat", encoder.max_tokens)
        ours = encoder.encode("a cat")
        if "model" in theirs:  # OpenCLIP
            context = theirs["model"](ids)
        elif isinstance(encoder, TextEncoder):
            context = theirs["transformer"]["text_model"](ids).last_hidden_state
        else:
            context = theirs["transformer"](ids)
    else:
        tokens = tuple(range(14))
        context, ours = theirs["transformer"](torch.tensor([tokens])), encoder.encode(tokens)
    assert_close(ours, context)
    return context


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_family(name: str, tokenizers: Path, tmp_path: Path) -> None:
    """Conditioner, UNet and autoencoder give what the original's modules give."""
    case, original = CASES[name], make(name)
    model = LatentDiffusion.load(write(original.tensors, tmp_path / "model.safetensors"), None, told(name, tokenizers))
    assert model.tasks == frozenset(case.tasks)
    assert model.conditioning == case.conditioning
    schedule = model.schedule.config
    assert (schedule.beta_start, schedule.beta_end, schedule.prediction_type) == (*case.betas, case.prediction)
    assert model.autoencoder.config.scaling_factor == pytest.approx(case.scale)

    context = context_of(original, model)
    x, t = torch.randn(2, model.unet.config.in_channels, 16, 16), torch.tensor([7, 803])
    labels = torch.tensor([20, 3]) if model.unet.config.num_class_embeds is not None else None
    contexts = None if context is None else context.expand(2, -1, -1)
    vectors, addition = vectors_of(original, model)
    theirs = original.unet(x, t, contexts, labels if vectors is None else vectors)
    assert_close(model.unet(x, t, contexts, labels, addition), theirs)

    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = original.first_stage.encode(pixels)
    assert_close(model.autoencoder.encode(pixels).mean, latents)
    assert_close(model.autoencoder.decode(latents), original.first_stage.decode(latents))
    if model.semantic is not None and original.conditioner is not None:
        assert torch.equal(model.semantic.weight, original.conditioner.state_dict()["channel_mapper.weight"])


@pytest.mark.parametrize("name", CASES)
def test_saved_as_a_folder(name: str, tokenizers: Path, tmp_path: Path) -> None:
    """In the file's own type; and read again, it is the same model."""
    halves = {
        key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in make(name).tensors.items()
    }
    path = write(halves, tmp_path / "model.safetensors")
    model = LatentDiffusion(*load_parts(path, Reading(dtype=None), told(name, tokenizers)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    save_folder(model, tmp_path / "folder", dtype=None)
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"] == CASES[name].pipeline
    again = LatentDiffusion.load(tmp_path / "folder")
    expected = {key: tensor.float() for key, tensor in model.state_dict().items()}
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    for part in ("unet", "autoencoder", "schedule"):
        assert getattr(again, part).config == getattr(model, part).config
    assert (again.tasks, again.conditioning) == (model.tasks, model.conditioning)
    if isinstance(model.conditioner, TextConditioner):
        assert isinstance(again.conditioner, TextConditioner)
        assert torch.equal(again.conditioner.token_ids(["a cat"]), model.conditioner.token_ids(["a cat"]))


@pytest.mark.parametrize("name", ["text2im", "super resolution", "celeba"])
@torch.no_grad()
def test_diffusers_reads_the_folders_of_ldms_pipelines(name: str, tokenizers: Path, tmp_path: Path) -> None:
    original = make(name)
    model = LatentDiffusion.load(write(original.tensors, tmp_path / "model.safetensors"), None, told(name, tokenizers))
    save_folder(model, tmp_path / "folder", dtype=torch.float32)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipeline).__name__ == CASES[name].pipeline
    x, t = torch.randn(1, model.unet.config.in_channels, 16, 16), torch.tensor([7])
    context = context_of(original, model)
    given = () if context is None else (context,)
    assert_close(pipeline.unet(x, t, *given).sample, original.unet(x, t, *given))
    pixels = torch.rand(1, 3, 32, 32)
    encoded = pipeline.vqvae.encode(pixels)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    assert_close(latents, original.first_stage.encode(pixels))
    if context is not None:
        assert_close(pipeline.bert(token_ids(pipeline.tokenizer, "a cat", 77))[0], context)


@pytest.mark.parametrize("name", ["sd1", "sd1 inpainting", "sd2", "sd x4", "sdxl"])
def test_diffusers_converts_to_the_same(name: str, tokenizers: Path, tmp_path: Path) -> None:
    original = make(name)
    model = LatentDiffusion.load(write(original.tensors, tmp_path / "model.safetensors"), None, told(name, tokenizers))
    unet = convert.convert_ldm_unet_checkpoint(dict(original.tensors), model.unet.config.to_dict())
    vae = convert.convert_ldm_vae_checkpoint(dict(original.tensors), model.autoencoder.config.to_dict())
    for part, theirs in ((model.unet, unet), (model.autoencoder, vae)):
        ours = part.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_open_clip_as_diffusers_converts_it(tokenizers: Path, tmp_path: Path) -> None:
    original = make("sd2")
    model = LatentDiffusion.load(write(original.tensors, tmp_path / "model.safetensors"), None, told("sd2", tokenizers))
    assert isinstance(model.conditioner, TextConditioner)
    ours: Any = model.conditioner.get_submodule("transformer")
    theirs = convert.convert_open_clip_checkpoint(ours, dict(original.tensors))
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[f"text_model.{key}"]), key


def test_sdxl_text_as_diffusers_converts_it(tokenizers: Path, tmp_path: Path) -> None:
    original = make("sdxl")
    model = LatentDiffusion.load(
        write(original.tensors, tmp_path / "model.safetensors"), None, told("sdxl", tokenizers)
    )
    assert isinstance(model.conditioner, TextPairEncoder)
    ours: Any = model.conditioner.text_encoder_2
    theirs = convert.convert_open_clip_checkpoint(ours, dict(original.tensors), prefix="conditioner.embedders.1.model.")
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key


def with_average(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averaged weights are kept by names without dots; here they differ from the last ones by 1."""
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1
        for key, tensor in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    return {**tensors, **averages, **counters}


@pytest.mark.parametrize("name", ["sd1", "class", "class f8", "celeba", "churches"])
@pytest.mark.parametrize("ema", [None, True, False])
def test_averaged_weights(name: str, ema: bool | None, tokenizers: Path, tmp_path: Path) -> None:
    """As the original scripts choose, unless told."""
    tensors = make(name).tensors
    path = write(with_average(tensors), tmp_path / "model.safetensors")
    model = LatentDiffusion.load(path, None, told(name, tokenizers, ema=ema))
    averaged = CASES[name].use_ema if ema is None else ema
    expected = tensors["model.diffusion_model.input_blocks.0.0.weight"] + (1 if averaged else 0)
    assert torch.equal(model.unet.conv_in.weight, expected)
    assert torch.equal(model.autoencoder.encoder.conv_in.weight, tensors["first_stage_model.encoder.conv_in.weight"])


def test_a_file_without_averages_is_used_as_it_is(tmp_path: Path) -> None:
    path = write(make("celeba").tensors, tmp_path / "model.safetensors")
    weight = LatentDiffusion.load(path, None, Told(ema=True)).unet.conv_in.weight
    assert torch.equal(weight, make("celeba").tensors["model.diffusion_model.input_blocks.0.0.weight"])


def test_what_the_user_knows_better(tokenizers: Path, tmp_path: Path) -> None:
    """Models of SD 2 for 512 pixels have the keys of those for 768."""
    path = write(make("sd2").tensors, tmp_path / "model.safetensors")
    model = LatentDiffusion.load(path, None, told("sd2", tokenizers))
    assert (model.schedule.config.prediction_type, model.unet.config.size) == ("v_prediction", (96, 96))
    model = LatentDiffusion.load(path, None, told("sd2", tokenizers, prediction_type="epsilon"))
    assert (model.schedule.config.prediction_type, model.unet.config.size) == ("epsilon", (64, 64))
    assert model.autoencoder.config.sample_size == 512


def test_every_wrong_key_is_told_at_once_as_the_file_calls_it(tmp_path: Path) -> None:
    tensors = dict(make("celeba").tensors)
    qkv = "model.diffusion_model.middle_block.1.qkv.weight"
    tensors[qkv] = tensors[qkv][:-1].clone()
    tensors["model.diffusion_model.stray.weight"] = torch.zeros(2)
    tensors["first_stage_model.encoder.stray"] = torch.zeros(2)
    del tensors["model.diffusion_model.out.0.weight"], tensors["first_stage_model.decoder.mid.attn_1.k.bias"]
    with pytest.raises(WeightsError) as caught:
        LatentDiffusion.load(write(tensors, tmp_path / "model.safetensors"))
    width = make("celeba").tensors[qkv].shape[1]
    for problem in (
        "missing model.diffusion_model.out.0.weight",
        "missing first_stage_model.decoder.mid.attn_1.k.bias",
        "unexpected model.diffusion_model.stray.weight",
        "unexpected first_stage_model.encoder.stray",
        f"{qkv} is [{3 * width - 1}, {width}, 1], expected [{3 * width}, {width}, 1]",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("kept", [0, 8, 1000, -1])
def test_truncated(tmp_path: Path, kept: int) -> None:
    path = write(make("celeba").tensors, tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        LatentDiffusion.load(path)


def test_files_that_are_something_else(tokenizers: Path, tmp_path: Path) -> None:
    def fails(tensors: dict[str, Tensor], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            LatentDiffusion.load(write(tensors, tmp_path / "model.safetensors"))

    tensors = make("celeba").tensors
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    fails(unet, WeightsError, "holds no autoencoder")
    fails({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, WeightsError, "holds no UNet")
    fails({**tensors, "conditioner.embedders.0.a": torch.zeros(1)}, UnsupportedStructure, "SDXL")
    fails({**tensors, "cond_stage_model.embedding.weight": torch.zeros(3, CONTEXT)}, UnsupportedStructure, "beside")
    wide = "model.diffusion_model.input_blocks.0.0.weight"
    fails({**tensors, wide: torch.zeros(32, 5, 3, 3)}, UnsupportedStructure, "5 channels into its UNet and 3 out")
    less = {key: tensor for key, tensor in tensors.items() if "input_blocks.1." not in key}
    fails(less, UnsupportedStructure, r"input_blocks\.1\.0\.out_layers")


def test_the_tokenizer_is_looked_for_beside_the_file(tokenizers: Path, tmp_path: Path) -> None:
    path = write(make("sd1").tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"put vocab\.json and merges\.txt .* into .*tokenizer.*--tokenizer"):
        LatentDiffusion.load(path)
    for file in (tokenizers / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    beside = LatentDiffusion.load(path)
    (tmp_path / "tokenizer_config.json").unlink()  # vocab.json and merges.txt are enough
    bare = LatentDiffusion.load(path)
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(tmp_path / "tokenizer" / name)
    below = LatentDiffusion.load(path)
    for model in (beside, bare, below):
        assert isinstance(model.conditioner, TextConditioner)
        assert model.conditioner.max_tokens == original_files.LENGTH
        ids = model.conditioner.token_ids(["cat"])[0].tolist()
        assert ids[1] == 53
        assert ids[2:] == [57] * 10, "padded with the end token"


def test_open_clip_pads_with_its_first_token(tokenizers: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((tokenizers / "clip" / "vocab.json").read_text())
    vocabulary |= {"a": vocabulary.pop("z"), "!": vocabulary["a"]}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text((tokenizers / "clip" / "merges.txt").read_text())
    model = LatentDiffusion.load(write(make("sd2").tensors, tmp_path / "model.safetensors"))
    assert isinstance(model.conditioner, TextConditioner)
    assert model.conditioner.token_ids(["cat"])[0].tolist()[2:] == [57] + [0] * 9


def test_pickled_checkpoints(tmp_path: Path) -> None:
    """Read only where that is asked for."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": make("celeba").tensors, "global_step": 3}, path)
    with pytest.raises(WeightsError, match="darkroom models add"):
        LatentDiffusion.load(path)
    parts = load_parts(path, Reading(dtype=None, pickles=True))
    assert torch.equal(parts.unet.conv_out.weight, make("celeba").tensors["model.diffusion_model.out.2.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": torch.ones(2)}, r"scale_factor is \[2\]; expected one number"),
        ({"scale_factor": torch.zeros(())}, "scaling_factor=0.0: expected more than 0"),
        ({"encoder.conv_in.weight": torch.zeros(1)}, "unexpected encoder.conv_in.weight"),
    ],
)
def test_what_makes_no_sense_in_a_whole_file(changes: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    path = write({**make("churches").tensors, **changes}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"model.safetensors.*{message}"):
        LatentDiffusion.load(path)
