"""What the engine computes once is what the plain forward computes at every step, within 1e-5 in fp32."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.tasks import PictureRequest, prepare
from tests.tiny_models import BASE, UPSCALER
from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey

Models = Mapping[str, LatentDiffusion]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5)


def calls(module: nn.Module) -> list[int]:
    """Batch sizes of the module's calls from now on."""
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return sizes


def first_text_attention(model: LatentDiffusion) -> Any:
    return next(model.unet._text_attentions())


@pytest.mark.parametrize("name", [BASE, UPSCALER])
def test_time_table_plus_class_embedding_is_embed(models: Models, name: str) -> None:
    resident = ResidentModel(models[name])
    t = torch.tensor([0, 1, 250, 999])
    table = resident.time_table[t]
    if name == BASE:
        assert resident.class_embedding(None) is None
        expected = models[name].unet.embed(t)
    else:
        label = resident.class_embedding(20)
        assert label is not None
        table = table + label
        expected = models[name].unet.embed(t, torch.full((4,), 20))
        with pytest.raises(ValueError, match="class label 350: expected 0 to 349"):
            resident.class_embedding(350)
    assert_equal(table, expected)


def test_keys_and_values_are_projected_once_and_texts_encoded_once(models: Models) -> None:
    model = models[BASE]
    assert model.conditioner is not None
    resident = ResidentModel(model)
    bank = Bank(resident, LaneKey(BASE, 8, 8, guided=True), 2)
    encoded, projected = calls(model.conditioner), calls(first_text_attention(model).to_k)
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=4, guidance_scale=2.0)
    for slot in range(2):
        runner.admit(resident, bank, slot, request)
    for _ in range(4):
        runner.step(resident, bank, slice(0, 2))
    assert encoded == [1]  # "a cat"; the bank encoded the empty prompt when it was made
    assert projected == [2, 2]
    context = torch.cat([model.conditioner.encode(prompt) for prompt in ("", "a cat")])
    for (k, v), (k_plain, v_plain) in zip(bank.rows_kv(slice(0, 2)), model.unet.project_context(context), strict=True):
        assert_equal(k[[0, 2]], k_plain)
        assert_equal(v[[1, 3]], v_plain)


@torch.no_grad()
def test_shared_prefix_is_the_forward_of_both_halves(models: Models) -> None:
    """The plain forward repeats all rows for guidance; `denoise` does so from the first text attention on."""
    unet = models[BASE].unet
    x, t = torch.randn(3, 9, 8, 8), torch.tensor([5, 500, 900])
    context = torch.randn(6, 24, unet.config.context_width)
    before, after = calls(unet.conv_in), calls(unet.conv_out)
    shared = unet(x, t, context)
    assert (before[-1], after[-1]) == (3, 6)
    plain = unet(torch.cat([x, x]), torch.cat([t, t]), context)
    assert (before[-1], after[-1]) == (6, 6)
    assert_equal(shared, plain)


@torch.no_grad()
def test_no_unconditional_row_at_guidance_one(models: Models) -> None:
    """At scale 1, u + s (c - u) is c: the lane runs the conditional rows alone."""
    model = models[BASE]
    resident = ResidentModel(model)
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=4, guidance_scale=1.0)
    bank = Bank(resident, LaneKey(BASE, 8, 8, guided=False), 2)
    runner.admit(resident, bank, 0, request)
    rows = calls(model.unet.conv_out)
    runner.step(resident, bank, slice(0, 1))
    assert rows == [1]
    both = Bank(resident, LaneKey(BASE, 8, 8, guided=True), 2)
    start = prepare(model, request)
    both.write(0, start, resident.project(["", "a cat"]).kv, 1.0, None)
    runner.step(resident, both, slice(0, 1))
    assert rows == [1, 2]
    assert_equal(bank.x[0], both.x[0])


def mixed(image: Image.Image) -> list[PictureRequest]:
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 5}
    partial: dict[str, Any] = fields | {"steps": 6, "image": image, "strength": 0.99}  # 5 of 6 steps
    return [
        PictureRequest("txt2img", "a cat", seed=1, guidance_scale=6.0, **fields),
        PictureRequest("txt2img", "two dogs", seed=2, guidance_scale=1.5, eta=1.0, **fields),
        PictureRequest("img2img", "", seed=3, guidance_scale=3.0, **partial),
        PictureRequest("txt2img", "a house", seed=4, guidance_scale=3.0, sampler="ddpm", **fields),
        PictureRequest("txt2img", "a house", seed=4, guidance_scale=3.0, sampler="euler", **fields),
        PictureRequest("txt2img", "a house", seed=4, guidance_scale=3.0, sampler="euler_ancestral", **fields),
        PictureRequest("img2img", "a house", seed=4, guidance_scale=3.0, sampler="dpmpp_2m", **partial),
    ]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_rows_with_own_settings_equal_the_plain_loop(
    models: Models, picture: Image.Image, spacing: Literal["trailing", "linspace"]
) -> None:
    """Latents after five steps in one batch, against each row alone. Euler's linspace timesteps are fractional."""
    shipped = models[BASE]
    schedule = NoiseSchedule(dataclasses.replace(shipped.schedule.config, timestep_spacing=spacing))
    model = LatentDiffusion(shipped.unet, shipped.autoencoder, shipped.conditioner, schedule)
    resident = ResidentModel(model)
    requests = mixed(picture.resize((64, 64)))
    bank = Bank(resident, LaneKey(BASE, 8, 8, guided=True), len(requests) + 1)
    rows = [runner.admit(resident, bank, slot, one) for slot, one in enumerate(requests)]
    assert any(time is not None for _, time in rows) == (spacing == "linspace")
    for step in range(5):
        for slot, (start, time) in enumerate(rows):
            runner.feed(bank, slot, start, time, step)
        runner.step(resident, bank, slice(0, len(requests) + 1))
    assert bank.step.tolist() == [5] * len(requests) + [0]
    for slot, one in enumerate(requests):
        assert_equal(bank.x[slot], model.render_latents(one)[0])
    assert not bank.x[-1].any()
