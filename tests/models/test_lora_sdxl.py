"""Adapters of SDXL against diffusers: two text encoders, and kohya's names, which are those of the original layout."""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.lora_files import load_adapter
from models.tasks import PictureRequest
from models.text_pair import TextPairEncoder
from tests.adapter_files import ATTENTION, EVERYWHERE, TEXT, random_pairs, write_kohya, write_peft
from tests.models.sdxl import sdxl
from tests.models.small import diffusers
from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Tuning, tune

TOLERANCE = 5e-5
REQUEST = PictureRequest("txt2img", "a cat", 64, 48, seed=11, steps=3, guidance_scale=5.0, negative_prompt="dog")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return sdxl(tmp_path_factory.mktemp("vocabulary"))


def original(name: str) -> str:
    """Of an attention: both ways a level has three blocks, the third of which up is one more, down the downsampling."""

    def block(found: re.Match[str]) -> str:
        direction = {"down": "input_blocks", "up": "output_blocks"}[found[1]]
        return f"{direction}.{3 * int(found[2]) + int(found[3]) + (found[1] == 'down')}.1"

    name = re.sub(r"^(down|up)_blocks\.(\d)\.attentions\.(\d)", block, name)
    return name.replace("mid_block.attentions.0", "middle_block.1")


def write(path: Path, model: LatentDiffusion, format_: str) -> None:
    assert isinstance(model.conditioner, TextPairEncoder)
    assert model.unet.config.layers_per_block == 2
    unet = random_pairs(model.unet, ATTENTION, 3, 1)
    text = random_pairs(model.conditioner.text_encoder, TEXT, 2, 2)
    text_2 = random_pairs(model.conditioner.text_encoder_2, TEXT, 2, 3)
    if format_ == "peft":
        write_peft(path, unet, text, None, text_2)
        return
    original_unet = {original(name): pair for name, pair in unet.items()}
    write_kohya(path, original_unet, text, 1.5, "te1", text_2)


def their_latents(pipeline: Any) -> Tensor:
    latents: Tensor = pipeline(
        prompt=REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.guidance_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        width=REQUEST.width,
        height=REQUEST.height,
        output_type="latent",
    ).images
    return latents


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("format_", ["peft", "kohya"])
def test_pictures_are_those_of_diffusers(
    model: LatentDiffusion,
    pipeline_of: Callable[[LatentDiffusion, type[Any]], Any],
    tmp_path: Path,
    format_: str,
) -> None:
    """Of the plain loop and of the engine."""
    path = tmp_path / "style.safetensors"
    write(path, model, format_)
    pipeline = pipeline_of(model, diffusers.StableDiffusionXLPipeline)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(model.schedule.config.to_dict(), clip_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of modules without adapters
        pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="style")
    pipeline.set_adapters(["style"], [0.8])
    theirs = their_latents(pipeline)
    pipeline.unload_lora_weights()
    adapter = load_adapter(path, model)
    assert {name.partition(".")[0] for name in adapter.text} == {"text_encoder", "text_encoder_2"}
    model.adapters = {"style": adapter}
    request = PictureRequest(**{**vars(REQUEST), "loras": (("style", 0.8),)})
    torch.testing.assert_close(model.render_latents(request), theirs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(engine_latents(model, {"a": REQUEST, "b": request})["b"], theirs, rtol=0, atol=TOLERANCE)
    assert (theirs - model.render_latents(REQUEST)).abs().max() > 100 * TOLERANCE


@torch.inference_mode()
def engine_latents(model: LatentDiffusion, requests: Mapping[str, PictureRequest]) -> dict[str, Tensor]:
    resident = ResidentModel(tune(model, Tuning()))
    bank = Bank(resident, LaneKey("sdxl", 6, 8, guided=True, rank=8), len(requests))
    rows = [runner.admit(resident, bank, slot, one) for slot, one in enumerate(requests.values())]
    for step in range(REQUEST.steps):
        for slot, (start, time) in enumerate(rows):
            runner.feed(bank, slot, start, time, step)
        runner.step(resident, bank, slice(0, len(rows)))
    return {name: bank.x[slot : slot + 1] for slot, name in enumerate(requests)}


@pytest.mark.parametrize(
    ("pattern", "gain"),
    [(EVERYWHERE, 0.1), (r"add_embedding\.linear_\d", 0.3), (r"time_embedding\.linear_\d|.*time_emb_proj", 0.3)],
)
def test_whatever_an_adapter_changes_the_engine_changes_alike(
    model: LatentDiffusion, tmp_path: Path, pattern: str, gain: float
) -> None:
    """Beside a row without. What is added to the time embedding is made once, its projections at every step."""
    path = tmp_path / "style.safetensors"
    write_peft(path, random_pairs(model.unet, pattern, 3, 1, gain))
    model.adapters = {"style": load_adapter(path, model)}
    styled = PictureRequest(**{**vars(REQUEST), "loras": (("style", 0.8),)})
    made = engine_latents(model, {"plain": REQUEST, "styled": styled})
    for name, request in {"plain": REQUEST, "styled": styled}.items():
        torch.testing.assert_close(made[name], model.render_latents(request), rtol=0, atol=TOLERANCE)
    assert (made["styled"] - made["plain"]).abs().max() > 100 * TOLERANCE
