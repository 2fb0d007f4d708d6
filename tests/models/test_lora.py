"""Low-rank adapters against diffusers and peft: the same files, in every format, at the same weights."""

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.lora import Adapter, adapted, merge
from models.lora_files import copy_adapter, load_adapter, load_adapters
from models.tasks import PictureRequest
from models.text import TextEncoder
from models.weights_io.tensors import WeightsError
from tests.adapter_files import (
    ATTENTION,
    EVERYWHERE,
    TEXT,
    adapter_of,
    random_pairs,
    text_root,
    write_kohya,
    write_old_diffusers,
    write_peft,
)
from tests.models.small import KL_F8, UNET, assemble, diffusers

TOLERANCE = 5e-5
ALPHAS = {
    "unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 1.5, "^conv_in": 4}, "unet.target_modules": [],
    "text_encoder.r": 3, "text_encoder.lora_alpha": 1, "text_encoder.target_modules": [],
}  # fmt: skip
FORMATS: dict[str, tuple[Callable[..., None], str]] = {
    "peft": (write_peft, EVERYWHERE),
    "diffusers 0.1": (write_old_diffusers, ATTENTION),
    "diffusers 0.2": (write_old_diffusers, EVERYWHERE),
    "kohya": (write_kohya, EVERYWHERE),
    "kohya with alpha": (functools.partial(write_kohya, alpha=1.5), EVERYWHERE),
    "kohya, first of two text encoders": (functools.partial(write_kohya, alpha=4.0, te="te1"), ATTENTION),
}
PipelineOf = Callable[[LatentDiffusion, type[Any]], Any]


@pytest.fixture(scope="module")
def linear_model(text_encoder: TextEncoder) -> LatentDiffusion:
    """Linear projections around the transformers, as in SD 2."""
    return assemble(text_encoder, KL_F8, UNetConfig(**{**vars(UNET), "use_linear_projection": True}), ScheduleConfig())


@pytest.fixture(params=["conv projections", "linear projections"])
def model(
    request: pytest.FixtureRequest, text_model: LatentDiffusion, linear_model: LatentDiffusion
) -> LatentDiffusion:
    return text_model if request.param == "conv projections" else linear_model


@pytest.fixture
def peer(model: LatentDiffusion, pipeline_of: PipelineOf) -> Iterator[Any]:
    """The model in diffusers, without adapters before and after."""
    pipeline = pipeline_of(model, diffusers.StableDiffusionPipeline)
    yield pipeline
    pipeline.unload_lora_weights()


def load_into(peer: Any, path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of modules without adapters
        peer.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)


def outputs(model: LatentDiffusion, uses: list[tuple[Adapter, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Text embedding, one UNet forward, latents of a picture."""
    assert model.conditioner is not None
    with adapted(model, uses), torch.no_grad():
        context = model.conditioner.encode("a cat")
        forward = model.unet(_x(), torch.tensor([500, 20]), torch.cat([context, context.flip(1)]))
        return context, forward, model.render_latents(_REQUEST)


def their_outputs(peer: Any, model: LatentDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(model.conditioner, TextEncoder)
    with torch.no_grad():
        context = peer.text_encoder(model.conditioner.token_ids(["a cat"])).last_hidden_state
        forward = peer.unet(_x(), torch.tensor([500, 20]), torch.cat([context, context.flip(1)])).sample
        latents = peer(
            prompt=_REQUEST.prompt,
            negative_prompt=_REQUEST.negative_prompt,
            num_inference_steps=_REQUEST.steps,
            guidance_scale=_REQUEST.guidance_scale,
            generator=torch.Generator().manual_seed(_REQUEST.seed),
            width=_REQUEST.width,
            height=_REQUEST.height,
            output_type="latent",
        ).images
    return context, forward, latents


_REQUEST = PictureRequest("txt2img", "a cat", 64, 48, seed=5, steps=3, negative_prompt="dog")


def _x() -> Tensor:
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(9))


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def assert_different(ours: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, others, strict=True):
        assert (one - other).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_gives_what_diffusers_gives(
    model: LatentDiffusion, peer: Any, format_: str, tmp_path: Path
) -> None:
    write, pattern = FORMATS[format_]
    path = adapter_of(model, write, tmp_path / "style.safetensors", pattern)
    load_into(peer, path, "style")
    peer.set_adapters(["style"], [0.7])
    ours = outputs(model, [(load_adapter(path, model), 0.7)])
    assert_same(ours, their_outputs(peer, model))
    assert_different(ours, outputs(model, []))


def test_two_adapters_at_once_with_weights(model: LatentDiffusion, peer: Any, tmp_path: Path) -> None:
    """Of different format, rank and reach; then one of them alone again."""
    one = adapter_of(model, write_peft, tmp_path / "one.safetensors", EVERYWHERE, rank=2, seed=1)
    other = adapter_of(model, write_kohya, tmp_path / "other.safetensors", ATTENTION, rank=5, seed=2)
    load_into(peer, one, "one")
    load_into(peer, other, "other")
    uses = [(load_adapter(one, model), 0.8), (load_adapter(other, model), -0.5)]
    peer.set_adapters(["one", "other"], [0.8, -0.5])
    assert_same(outputs(model, uses), their_outputs(peer, model))
    peer.set_adapters(["other"], [-0.5])
    assert_same(outputs(model, uses[1:]), their_outputs(peer, model))


def test_merged_weights_are_those_that_diffusers_fuses(model: LatentDiffusion, peer: Any, tmp_path: Path) -> None:
    path = adapter_of(model, functools.partial(write_kohya, alpha=1.5), tmp_path / "style.safetensors", EVERYWHERE)
    load_into(peer, path, "style")
    peer.fuse_lora(lora_scale=0.6)
    uses = [(load_adapter(path, model), 0.6)]
    merged = copy.deepcopy(model)
    merge(merged, uses)
    plain = outputs(merged, [])
    theirs = their_outputs(peer, model)
    peer.unfuse_lora()
    assert_same(plain, theirs)
    assert_same(plain, outputs(model, uses))


def test_alphas_from_the_header(model: LatentDiffusion, tmp_path: Path) -> None:
    """`lora_alpha` per part, `alpha_pattern` by name and by ending; peft itself reads the patterns alike."""
    unet = random_pairs(model.unet, r".*attn1\.to_(q|k)|conv_in", 3, 1)
    write_peft(tmp_path / "a.safetensors", unet, random_pairs(text_root(model), TEXT, 3, 2), ALPHAS)
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    scales = {name.rpartition(".")[2]: low_rank.scale for name, low_rank in adapter.unet.items()}
    assert scales == {"to_q": 0.5, "to_k": 2.0, "conv_in": 4 / 3}
    assert {low_rank.scale for low_rank in adapter.text.values()} == {1 / 3}
    write_peft(tmp_path / "b.safetensors", unet, None, {"unet.lora_alpha": 6, "unet.use_rslora": True})
    stabilised = load_adapter(tmp_path / "b.safetensors", model)
    assert {low_rank.scale for low_rank in stabilised.unet.values()} == {6 / 3**0.5}


def test_header_as_diffusers_writes_it(model: LatentDiffusion, peer: Any, tmp_path: Path) -> None:
    """An adapter made by peft, saved by diffusers with its alphas, read by both."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False,
                             rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 5})  # fmt: skip
    peer.unet.add_adapter(config, adapter_name="trained")
    state = peft.utils.get_peft_model_state_dict(peer.unet, adapter_name="trained")
    settings = {"unet_lora_adapter_metadata": peer.unet.peft_config["trained"].to_dict()}
    for value in settings.values():
        value["target_modules"] = sorted(value["target_modules"])
    type(peer).save_lora_weights(tmp_path, state, **settings)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    peer.set_adapters(["trained"], [1.0])
    _, forward, latents = outputs(model, [(load_adapter(path, model), 1.0)])
    assert_same((forward, latents), their_outputs(peer, model)[1:])


def test_file_of_peft_itself(text_model: LatentDiffusion, tmp_path: Path) -> None:
    """`base_model.model.` before every name, alpha in a file beside, which a copy takes along."""
    pairs = random_pairs(text_model.unet, ATTENTION, 4, 1)
    write_peft(tmp_path / "plain.safetensors", pairs)
    tensors = load_file(tmp_path / "plain.safetensors")
    native = tmp_path / "native" / "adapter_model.safetensors"
    native.parent.mkdir()
    renamed = {"base_model.model." + key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    save_file(renamed, native)
    assert {one.scale for one in load_adapter(native, text_model).unet.values()} == {1.0}
    native.with_name("adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    copy_adapter(native, tmp_path / "loras" / "style.safetensors")
    copied = load_adapters(tmp_path, text_model)["style"]
    assert {one.scale for one in copied.unet.values()} == {2.0}
    assert copied.unet.keys() == pairs.keys()
    assert all(torch.equal(copied.unet[name].down, down) for name, (down, _) in pairs.items())


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["bare", "wrapped"])
def test_text_encoder_with_and_without_its_wrapper(text_model: LatentDiffusion, tmp_path: Path, prefix: str) -> None:
    pairs = random_pairs(text_root(text_model), TEXT, 2, 1)
    old = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        parent, _, leaf = name.rpartition(".")
        stem = f"text_encoder.{prefix}{parent}.{old.get(leaf, leaf + '.lora_linear_layer')}"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", text_model)
    assert adapter.text.keys() == {f"transformer.{name}" for name in pairs}
    assert not adapter.unet


@pytest.mark.parametrize("dims", [2, 4])
def test_pointwise_projections_fit_in_either_shape(model: LatentDiffusion, tmp_path: Path, dims: int) -> None:
    """SD 1 has 1x1 convolutions [o, i, 1, 1] where SD 2 has linears [o, i]; adapters come in both shapes for both."""
    pairs = random_pairs(model.unet, r".*proj_in", 2, 1)
    shaped = {
        name: tuple(one.reshape(*one.shape[:2], *[1] * (dims - 2)) for one in pair) for name, pair in pairs.items()
    }
    write_peft(tmp_path / "a.safetensors", shaped)  # type: ignore[arg-type]
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    merged = copy.deepcopy(model)
    merge(merged, [(adapter, 1.0)])
    name = next(iter(pairs))
    added = merged.unet.get_submodule(name).weight - model.unet.get_submodule(name).weight  # type: ignore[operator]
    down, up = pairs[name]
    torch.testing.assert_close(added.flatten(1), up.flatten(1) @ down.flatten(1))


def test_weight_zero_and_leaving_restore_the_model(text_model: LatentDiffusion, tmp_path: Path) -> None:
    adapter = load_adapter(adapter_of(text_model, write_peft, tmp_path / "a.safetensors"), text_model)
    plain = outputs(text_model, [])
    assert all(torch.equal(one, other) for one, other in zip(outputs(text_model, [(adapter, 0.0)]), plain, strict=True))
    changed = outputs(text_model, [(adapter, 1.0)])
    assert_different(changed, plain)
    text_model.adapters = {"style": adapter}
    asked = PictureRequest(**{**vars(_REQUEST), "loras": (("style", 0.5), ("style", 0.5))})
    assert_same((text_model.render_latents(asked),), changed[2:])
    text_model.adapters = {}
    with pytest.raises(ValueError, match="no adapter of this model: style, style; it has: none"):
        text_model.render_latents(asked)
    assert all(torch.equal(one, other) for one, other in zip(outputs(text_model, []), plain, strict=True))


def test_adapter_of_another_model_is_one_error_that_lists_what_is_wrong(
    text_model: LatentDiffusion, tmp_path: Path
) -> None:
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    conv = "down_blocks.0.resnets.0.conv1"
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"unet.{attention}.to_q.lora_A.weight": down,
        f"unet.{attention}.to_k.lora_A.weight": torch.randn(2, 12),
        f"unet.{attention}.to_k.lora_B.weight": up,
        f"unet.{conv}.lora_A.weight": torch.randn(2, 8, 1, 1),
        f"unet.{conv}.lora_B.weight": torch.randn(8, 2, 1, 1),
        "unet.down_blocks.9.to_q.lora_A.weight": down,
        "lora_unet_nowhere.lora_down.weight": down,
        "lora_unet_conv_in.hada_w1_a": down,
        f"unet.{attention}.to_v.lora_A.weight": down,
        f"unet.{attention}.to_v.lora_B.weight": up,
        f"unet.{attention}.to_v.alpha": torch.ones(3),
    }
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError) as error:
        load_adapter(tmp_path / "a.safetensors", text_model)
    for text in (
        str(tmp_path / "a.safetensors"),
        f"{attention}.to_q lacks up",
        f"{attention}.to_k is down [2, 12], up [16, 2]; expected [r, 16], [16, r] for its weight [16, 16]",
        f"{conv} is down [2, 8, 1, 1], up [8, 2, 1, 1]; expected [r, 8, 3, 3], [8, r] for its weight [8, 8, 3, 3]",
        "unexpected unet.down_blocks.9.to_q.lora_A.weight: the model has no such module",
        "unexpected lora_unet_nowhere.lora_down.weight",
        "unexpected lora_unet_conv_in.hada_w1_a",
        f"{attention}.to_v has an alpha of shape [3], expected one number",
    ):
        assert text in str(error.value)


def test_broken_files(text_model: LatentDiffusion, tmp_path: Path) -> None:
    whole = adapter_of(text_model, write_peft, tmp_path / "loras" / "a.safetensors")
    data = whole.read_bytes()
    for name, content, message in (
        ("truncated", data[: len(data) // 2], "is no whole safetensors file"),
        ("other", b"\x80\x04 pickled", "is no whole safetensors file"),
        ("missing", None, "cannot be read"),
    ):
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(WeightsError, match=message) as error:
            load_adapter(path, text_model)
        assert str(path) in str(error.value)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WeightsError, match="holds no tensors"):
        load_adapter(tmp_path / "empty.safetensors", text_model)
    write_peft(
        tmp_path / "alpha.safetensors", random_pairs(text_model.unet, "conv_in", 1, 1), None, {"unet.lora_alpha": "x"}
    )
    with pytest.raises(WeightsError, match="conv_in has alpha 'x', expected a number"):
        load_adapter(tmp_path / "alpha.safetensors", text_model)
    (tmp_path / "loras" / "b.safetensors").write_bytes(data[:100])
    with pytest.raises(WeightsError, match=r"b\.safetensors is no whole"):
        load_adapters(tmp_path, text_model)


def test_adapters_of_a_folder_by_name_with_digests(text_model: LatentDiffusion, tmp_path: Path) -> None:
    assert load_adapters(tmp_path, text_model) == {}
    adapter_of(text_model, write_peft, tmp_path / "loras" / "film.safetensors", seed=1)
    adapter_of(text_model, write_kohya, tmp_path / "loras" / "neon-2.safetensors", seed=2)
    adapters = load_adapters(tmp_path, text_model)
    assert list(adapters) == ["film", "neon-2"]
    assert len({adapter.digest for adapter in adapters.values()}) == 2
