"""`darkroom render`: with --raw the picture of diffusers' pipelines, from folders and from single files."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cli.main import app
from models.latent_diffusion import LatentDiffusion
from models.weights_io.folder import save_folder
from models.weights_io.single_file import Told
from tests.models.original_files import make, tokenizer_of, write, write_tokenizers

diffusers: Any = importlib.import_module("diffusers")
COMMON = {"steps": 4, "guidance_scale": 5.0, "seed": 11}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`render` sets the threads of its process, here that of all tests."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("DARKROOM_WORKER_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd1, "sd1 inpainting" and "sd x4": a folder and a single file of each."""
    folder = tmp_path_factory.mktemp("models")
    write_tokenizers(folder)
    for name in ("sd1", "sd1 inpainting", "sd x4"):
        path = write(make(name).tensors, folder / f"{name}.safetensors")
        save_folder(
            LatentDiffusion.load(path, None, Told(tokenizer_of(name, folder))), folder / name, dtype=torch.float32
        )
    return folder


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Path:
    """Inputs beside which specs are written."""
    levels = np.random.default_rng(5).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(levels, "RGB").resize((64, 64), Image.Resampling.BICUBIC)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[13:38, 8:43] = 255
    (folder / "inputs").mkdir()
    picture.save(folder / "inputs" / "image.png")
    picture.resize((32, 16)).save(folder / "inputs" / "small.png")
    Image.fromarray(mask, "L").save(folder / "inputs" / "mask.png")
    return folder / "inputs"


def run(pictures: Path, spec: dict[str, Any], *arguments: object, ok: bool = True) -> Result:
    (pictures / "spec.json").write_text(json.dumps({"prompt": "a cat", **COMMON, **spec}))
    done = CliRunner().invoke(
        app, ["render", str(pictures / "spec.json"), *map(str, arguments)], env={"COLUMNS": "200"}
    )
    assert (done.exit_code == 0) == ok, done.output
    return done


def rendered(pictures: Path, out: Path, spec: dict[str, Any], *arguments: object) -> np.ndarray[Any, Any]:
    run(pictures, spec, "--out", out, *arguments)
    return np.asarray(Image.open(out / "render-0.png").convert("RGB"), dtype=int)


def theirs(pipeline: Any, **options: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": COMMON["steps"], "guidance_scale": COMMON["guidance_scale"]}
    generator = torch.Generator().manual_seed(11)
    return np.asarray(pipeline("a cat", generator=generator, **given, **options).images[0], dtype=int)


def pipeline_of(kind: str, folder: Path) -> Any:
    return getattr(diffusers, kind).from_pretrained(folder)


IMAGE = {"width": 64, "height": 64}


def test_txt2img(folder: Path, pictures: Path, tmp_path: Path) -> None:
    ours = rendered(pictures, tmp_path, IMAGE, "--model", folder / "sd1", "--raw", "--dtype", "float32")
    expected = theirs(pipeline_of("StableDiffusionPipeline", folder / "sd1"), width=64, height=64)
    assert expected.std() > 10
    assert np.abs(ours - expected).max() <= 1


def test_img2img(folder: Path, pictures: Path, tmp_path: Path) -> None:
    spec = {"task": "img2img", "strength": 0.6, "inputs": {"image": "image.png"}, **IMAGE}
    ours = rendered(pictures, tmp_path, spec, "--model", folder / "sd1", "--raw")
    pipeline = pipeline_of("StableDiffusionImg2ImgPipeline", folder / "sd1")
    expected = theirs(pipeline, image=Image.open(pictures / "image.png"), strength=0.6)
    assert np.abs(ours - expected).max() <= 1


def test_inpaint(folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Raw, what lies outside the mask went through the autoencoder as well; otherwise it is pasted back."""
    spec = {"task": "inpaint", "inputs": {"image": "image.png", "mask": "mask.png"}, **IMAGE}
    model = ("--model", folder / "sd1 inpainting")
    ours = rendered(pictures, tmp_path / "raw", spec, *model, "--raw")
    image, mask = (Image.open(pictures / f"{name}.png") for name in ("image", "mask"))
    pipeline = pipeline_of("StableDiffusionInpaintPipeline", folder / "sd1 inpainting")
    expected = theirs(pipeline, image=image, mask_image=mask, width=64, height=64, strength=1.0)
    assert np.abs(ours - expected).max() <= 1
    pasted = rendered(pictures, tmp_path / "pasted", spec, *model)
    kept = np.asarray(mask) == 0
    assert np.array_equal(pasted[kept], np.asarray(image, dtype=int)[kept])
    assert np.abs(ours[kept] - pasted[kept]).max() > 10


def test_upscale(folder: Path, pictures: Path, tmp_path: Path) -> None:
    spec = {"task": "upscale", "noise_level": 20, "inputs": {"image": "small.png"}, "width": 128, "height": 64}
    ours = rendered(pictures, tmp_path / "raw", spec, "--model", folder / "sd x4", "--raw")
    pipeline = pipeline_of("StableDiffusionUpscalePipeline", folder / "sd x4")
    expected = theirs(pipeline, image=Image.open(pictures / "small.png"), noise_level=20)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 1
    corrected = rendered(pictures, tmp_path / "corrected", spec, "--model", folder / "sd x4")
    assert np.abs(ours - corrected).max() > 1


def test_single_files_give_the_same_pictures(folder: Path, pictures: Path, tmp_path: Path) -> None:
    file = ("--model", folder / "sd1.safetensors", "--tokenizer", folder / "clip")
    of_file = rendered(pictures, tmp_path / "file", IMAGE, *file)
    of_folder = rendered(pictures, tmp_path / "folder", IMAGE, "--model", folder / "sd1")
    assert np.array_equal(of_file, of_folder)


@pytest.mark.parametrize(("dtype", "levels"), [("bfloat16", 24), ("float16", 8)])
def test_other_numbers(folder: Path, pictures: Path, tmp_path: Path, dtype: str, levels: int) -> None:
    model = ("--model", folder / "sd1", "--raw")
    full = rendered(pictures, tmp_path / "full", IMAGE, *model, "--dtype", "float32")
    half = rendered(pictures, tmp_path / "half", IMAGE, *model, "--dtype", dtype)
    assert 0 < np.abs(full - half).max() <= levels


def test_what_cannot_be_rendered(folder: Path, pictures: Path) -> None:
    def fails(expected: str, spec: dict[str, Any], *arguments: object) -> None:
        done = run(pictures, spec, *arguments, ok=False)
        assert expected in re.sub(r"\s+", " ", done.stderr.replace("│", " "))

    fails("has no tokenizer for sd1.safetensors", IMAGE, "--model", folder / "sd1.safetensors")
    fails("expected a model folder with its card", {"model": "nothing", **IMAGE})
    fails("model", IMAGE)
    fails(
        "serves txt2img, img2img, inpaint, not upscale",
        {"task": "upscale", "inputs": {"image": "small.png"}, **IMAGE},
        "--model",
        folder / "sd1",
    )
    fails("finds", IMAGE, "--model", folder / "sd1", "--device", "cuda:9")
