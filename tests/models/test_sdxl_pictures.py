"""SDXL's pictures against diffusers' pipelines from the same folder: alone, and in the engine's batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.config import UnsupportedStructure
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from tests.models.sdxl import sdxl
from tests.models.small import assemble, diffusers
from tests.models.structures import AUTOENCODERS, SDXL, UNETS
from worker.engine.engine import Engine
from worker.engine.events import LaneTicked, RowFailed, RowFinished
from worker.engine.resident import ResidentModel
from worker.engine.tuning import candidates, default_tuning, tune

TOLERANCE = 5e-5
WIDTH, HEIGHT, STEPS = 64, 48, 4
CPU = torch.device("cpu")
PipelineOf = Callable[[LatentDiffusion, type[Any]], Any]
MakeImage = Callable[[int, int], Image.Image]
SETTINGS: list[dict[str, Any]] = [
    {"guidance_scale": 5.0},
    {"guidance_scale": 5.0, "negative_prompt": "dog"},
    {"guidance_scale": 1.0},
    {"guidance_scale": 5.0, "eta": 1.0, "prompt": ""},
    {"guidance_scale": 5.0, "sampler": "euler"},
    {"guidance_scale": 3.0, "sampler": "euler_ancestral", "negative_prompt": "dog"},
]
old_numpy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[[LatentDiffusion], Any]) -> LatentDiffusion:
    """Through its folder."""
    return LatentDiffusion.load(folder_of(sdxl(tmp_path_factory.mktemp("vocabulary"))))


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return sdxl(tmp_path_factory.mktemp("vocabulary"), in_channels=9)


@pytest.fixture(scope="module")
def embroidered(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    """A model for which no negative prompt is an empty one."""
    return sdxl(tmp_path_factory.mktemp("vocabulary"), empty_is_zero=False)


def request_of(task: Any = "txt2img", **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"prompt": "a cat", "width": WIDTH, "height": HEIGHT, "seed": 11, "steps": STEPS}
    return PictureRequest(task=task, **(fields | changes))


SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}


def in_unit_range(pixels: Tensor) -> Tensor:
    return (pixels / 2 + 0.5).clamp(0, 1)


def check(model: LatentDiffusion, request: PictureRequest, pipeline: Any, **arguments: Any) -> None:
    """Latents, then the picture in [0, 1], within TOLERANCE; of the plain and of the tuned model."""
    kind = getattr(diffusers, SCHEDULERS[request.sampler])
    pipeline.scheduler = kind.from_config(model.schedule.config.to_dict(), clip_sample=False)
    theirs: Tensor = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        eta=request.eta,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **arguments,
    ).images
    with torch.no_grad():
        picture = in_unit_range(pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample)
    assert picture.std() > 0.1
    for one in (model, tune(model, default_tuning(CPU))):
        ours = one.render_latents(request)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(in_unit_range(one.decode_latents(ours)), picture, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def xl_pipeline_of(pipeline_of: PipelineOf) -> PipelineOf:
    def load(model: LatentDiffusion, kind: type[Any]) -> Any:
        pipeline = pipeline_of(model, kind)
        assert pipeline.watermark is None  # which the tests' machine has no package for
        return pipeline

    return load


@old_numpy
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_txt2img(model: LatentDiffusion, xl_pipeline_of: PipelineOf, settings: dict[str, Any]) -> None:
    pipeline = xl_pipeline_of(model, diffusers.StableDiffusionXLPipeline)
    check(model, request_of(**settings), pipeline, width=WIDTH, height=HEIGHT)


@old_numpy
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_img2img(
    model: LatentDiffusion, xl_pipeline_of: PipelineOf, noise_image: MakeImage, settings: dict[str, Any]
) -> None:
    pipeline, image = xl_pipeline_of(model, diffusers.StableDiffusionXLImg2ImgPipeline), noise_image(WIDTH, HEIGHT)
    request = request_of("img2img", image=image, strength=0.6, **{**settings, "steps": 5})
    check(model, request, pipeline, image=image, strength=0.6)


@pytest.mark.parametrize("strength", [0.9999, 0.6])
@pytest.mark.parametrize("which", ["model", "inpainter"])
def test_inpaint(
    request: pytest.FixtureRequest,
    xl_pipeline_of: PipelineOf,
    noise_image: MakeImage,
    hole: Image.Image,
    which: str,
    strength: float,
) -> None:
    """By blending, and with 9 channels."""
    model: LatentDiffusion = request.getfixturevalue(which)
    pipeline, image = xl_pipeline_of(model, diffusers.StableDiffusionXLInpaintPipeline), noise_image(WIDTH, HEIGHT)
    given = {"image": image, "mask": hole, "strength": strength, "guidance_scale": 5.0, "negative_prompt": "dog"}
    pictures = {"image": image, "mask_image": hole, "width": WIDTH, "height": HEIGHT}
    check(model, request_of("inpaint", **given), pipeline, strength=strength, **pictures)


def test_no_negative_prompt_of_a_model_that_encodes_an_empty_one(
    embroidered: LatentDiffusion, xl_pipeline_of: PipelineOf
) -> None:
    pipeline = xl_pipeline_of(embroidered, diffusers.StableDiffusionXLPipeline)
    check(embroidered, request_of(guidance_scale=5.0), pipeline, width=WIDTH, height=HEIGHT)


def requests(noise_image: MakeImage, hole: Image.Image) -> dict[str, PictureRequest]:
    """Different in all that rows of a lane may differ in; guided, unguided and blended ones."""
    image = noise_image(WIDTH, HEIGHT)
    return {
        "plain": request_of(guidance_scale=5.0),
        "negative": request_of(guidance_scale=3.0, negative_prompt="dog", seed=3, steps=6),
        "noisy": request_of(prompt="dog", guidance_scale=7.0, eta=1.0, seed=4),
        "euler": request_of(guidance_scale=5.0, sampler="euler", seed=5, steps=3),
        "img2img": request_of("img2img", image=image, strength=0.6, guidance_scale=2.0, seed=6, steps=5),
        "unguided": request_of(guidance_scale=1.0, seed=7),
        "unguided too": request_of(prompt="", guidance_scale=1.0, seed=8, steps=3),
        "inpaint": request_of("inpaint", image=image, mask=hole, strength=0.6, guidance_scale=5.0, steps=5),
        "other size": request_of(width=40, height=64, guidance_scale=5.0),
    }


def run(engine: Engine, wanted: dict[str, PictureRequest]) -> tuple[dict[str, Image.Image], int]:
    """The pictures, and how many rows shared a forward at most."""
    for name, one in wanted.items():
        engine.submit(name, "sdxl", one)
    made, most = {}, 0
    while not engine.idle:
        for event in engine.tick():
            assert not isinstance(event, RowFailed), event
            if isinstance(event, RowFinished):
                made[event.row_id] = event.image
            elif isinstance(event, LaneTicked):
                most = max(most, event.rows)
    return made, most


@pytest.mark.parametrize("tuned", [False, True])
def test_rows_of_a_batch_are_the_pictures_made_alone(
    model: LatentDiffusion, noise_image: MakeImage, hole: Image.Image, tuned: bool
) -> None:
    """Within a level of `render`, and with the same bits alone and in company."""
    one = tune(model, default_tuning(CPU)) if tuned else model
    wanted = requests(noise_image, hole)
    made, most = run(Engine({"sdxl": one}, buckets=(4,)), wanted)
    assert made.keys() == wanted.keys()
    assert most >= 3
    for name, request in wanted.items():
        alone, _ = run(Engine({"sdxl": one}, buckets=(4,)), {name: request})
        assert made[name].tobytes() == alone[name].tobytes()
        rendered = np.asarray(model.render(request), dtype=int)
        assert np.abs(np.asarray(made[name], dtype=int) - rendered).max() <= 1


def test_what_is_added_counts(model: LatentDiffusion) -> None:
    """Pooled text and size change the picture by much more than the tolerance, or these tests would prove little."""
    conditioner = model.conditioner
    assert conditioner is not None
    request = request_of(guidance_scale=5.0)
    latents, (_, pooled) = model.render_latents(request), model.project(model.conditions(request))
    assert pooled is not None
    before = model.addition(pooled, torch.zeros(1, 4, 6, 8))
    assert before is not None
    assert before.shape == (2, model.unet.config.time_embed_dim)
    assert (before[0] - before[1]).abs().max() > 0.1
    taller = model.addition(pooled, torch.zeros(1, 4, 8, 6))
    assert taller is not None
    assert (before - taller).abs().max() > 0.1
    original = model.unet.embed_addition
    model.unet.embed_addition = lambda pooled, sizes: original(torch.zeros_like(pooled), sizes)  # type: ignore[method-assign]
    try:
        assert (model.render_latents(request) - latents).abs().max() > 100 * TOLERANCE
    finally:
        del model.unet.embed_addition


@pytest.mark.parametrize("tuning", candidates(CPU, "bfloat16"), ids=str)
def test_a_batch_in_half_precision(
    model: LatentDiffusion, noise_image: MakeImage, hole: Image.Image, tuning: Any
) -> None:
    half, wanted = tune(model, tuning), requests(noise_image, hole)
    assert ResidentModel(half).time_table.dtype == torch.bfloat16
    made, _ = run(Engine({"sdxl": half}, buckets=(4,)), wanted)
    for name, request in wanted.items():
        error = np.asarray(made[name], dtype=float) - np.asarray(model.render(request), dtype=float)
        assert np.abs(error).mean() < 5


def test_parts_that_do_not_fit_are_refused(model: LatentDiffusion) -> None:
    conditioner = model.conditioner
    with pytest.raises(UnsupportedStructure, match="pooled_width=0; expected 10"):
        assemble(conditioner, AUTOENCODERS["kl_f8"], UNETS["sd1"], model.schedule.config)  # type: ignore[arg-type]
    assert model.unet.config == SDXL
    assert model.tasks == {"txt2img", "img2img", "inpaint"}
