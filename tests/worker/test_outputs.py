"""Files as other tools read them, always the same bytes."""

import hashlib
import io
from collections.abc import Callable

import pytest
from PIL import Image

from contract.spec import JobSpec, OutputFormat, Sampler
from worker.outputs import encode, encode_preview, parameters_text, picture_result
from worker.store_outage import pauses

MakeSpec = Callable[..., JobSpec]
DIGEST = "0123456789abcdef"


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_parameters_text(make_spec: MakeSpec) -> None:
    spec = make_spec(prompt="größe ☕", seed=7, n=2)
    assert parameters_text(spec, 1, DIGEST) == (
        "größe ☕\nSteps: 4, Sampler: DDIM, CFG scale: 3, Seed: 8, Size: 64x64, Model: tiny, Model hash: 0123456789"
    )
    titles = [parameters_text(make_spec(sampler=one), 0, "").split("Sampler: ")[1].split(",")[0] for one in Sampler]
    assert titles == ["DDIM", "DDPM", "Euler", "Euler a", "DPM++ 2M"]
    inputs = {"image": "inputs/a/image.png"}
    spec = make_spec(
        task="img2img", inputs=inputs, prompt="a cat", negative_prompt="dog", eta=0.5, strength=0.75, guidance_scale=2.5
    )
    assert parameters_text(spec, 0, "") == (
        "a cat\nNegative prompt: dog\nSteps: 4, Sampler: DDIM, CFG scale: 2.5, Seed: 7, Size: 64x64, Model: tiny, "
        "Eta: 0.5, Denoising strength: 0.75"
    )
    noised = make_spec(task="upscale", inputs=inputs, prompt="", noise_level=0)
    assert parameters_text(noised, 0, "").endswith("Model: tiny, Noise level: 0")
    styled = make_spec(prompt="a cat", loras=[{"name": "film", "weight": 0.8}, {"name": "neon"}])
    assert parameters_text(styled, 0, "").startswith("a cat <lora:film:0.8> <lora:neon:1>\nSteps: 4")
    wordless = styled.model_copy(update={"prompt": "", "class_label": 3})
    assert parameters_text(wordless, 0, "").startswith("<lora:film:0.8> <lora:neon:1>\nSteps: 4")


def test_png_is_lossless_and_carries_the_parameters(make_spec: MakeSpec, picture: Image.Image) -> None:
    spec = make_spec(prompt="größe ☕")
    image = opened(encode(picture, spec, 0, DIGEST))
    assert image.info == {"parameters": parameters_text(spec, 0, DIGEST)}
    assert image.tobytes() == picture.tobytes()


@pytest.mark.parametrize("output_format", [OutputFormat.JPEG, OutputFormat.WEBP])
def test_exif_carries_the_parameters(make_spec: MakeSpec, picture: Image.Image, output_format: OutputFormat) -> None:
    spec = make_spec(prompt="größe ☕", output_format=output_format)
    comment = opened(encode(picture, spec, 0)).getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + parameters_text(spec, 0, "").encode("utf-16-be")
    low = encode(picture, spec.model_copy(update={"output_quality": 10}), 0)
    assert len(low) < len(encode(picture, spec, 0))


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_no_metadata_when_asked_and_the_same_bytes_twice(
    make_spec: MakeSpec, picture: Image.Image, output_format: OutputFormat
) -> None:
    spec = make_spec(prompt="secret", output_format=output_format, metadata=False)
    data = encode(picture, spec, 0, DIGEST)
    assert data == encode(picture, spec, 0, DIGEST)
    assert not opened(data).getexif()
    assert b"secret" not in data.replace(b"\0", b"")


def test_a_result_tells_of_its_file(make_spec: MakeSpec) -> None:
    spec, data = make_spec(n=3), b"the file"
    result = picture_result(spec, "e1", 2, (50, 37), data)
    assert result.key == f"outputs/{spec.id}/e1/2.png"
    assert (result.index, result.seed, result.width, result.height) == (2, 9, 50, 37)
    assert (result.bytes, result.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_pauses_double_and_end_with_patience() -> None:
    assert [round(pause, 1) for pause in pauses(3.5)] == [0.2, 0.4, 0.8, 1.6, 0.5]
    many = list(pauses(120.0))
    assert (max(many), round(sum(many))) == (10.0, 120)
    assert list(pauses(0.0)) == []


def test_previews_are_small(picture: Image.Image) -> None:
    assert opened(encode_preview(picture.resize((8, 8)), 1024, 512)).size == (256, 128)
    assert opened(encode_preview(picture.resize((8, 8)), 64, 48)).size == (64, 48)
