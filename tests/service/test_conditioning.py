"""What a model takes beside a prompt: a class, a layout, a semantic map or nothing."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from broker.worker_side import WorkerBroker
from contract.settings import Settings
from contract.spec import JobSpec, LayoutObject
from tests.service.picture_makers import chunk, header
from tests.service.picture_makers import png as flat

OBJECTS = [{"label": 5, "box": [0.1, 0, 0.4, 0.5]}, {"label": 19, "box": [0.5, 0.5, 0.5, 0.5], "group": True}]


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def map_of(largest: int, mode: str = "L") -> Image.Image:
    """64 x 32 pixels of classes 0 to `largest`; a palette that maps them to other values."""
    grey = Image.new("L", (64, 32))
    grey.paste(largest, (32, 0, 64, 32))
    if mode == "P":
        grey.putpalette([255 - value // 3 for value in range(768)])
    return grey


def four_bits(value: int, colour: int = 0) -> bytes:
    """64 x 32 pixels of grey or of a palette's index. Decoders make 17 times as much of such a grey."""
    rows = zlib.compress((b"\0" + bytes((17 * value,)) * 32) * 32)
    return flat(header(64, 32, 4, colour), chunk(b"PLTE", bytes(48)), chunk(b"IDAT", rows))


def taken(worker: WorkerBroker) -> JobSpec:
    (job,) = worker.take(8)
    return job.spec


async def test_a_class_needs_no_model_name(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    job = (await client.post("/v1/txt2img", json={"class_label": 0})).raise_for_status().json()
    spec = taken(worker)
    assert (spec.model, spec.class_label, spec.prompt, spec.width) == ("imagenet", 0, "", 256)
    again = (await client.post("/v1/txt2img", json=job["request"])).raise_for_status().json()
    assert again["request"] == job["request"]
    assert taken(worker).class_label == 0


async def test_a_picture_of_a_class(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    files = {"image": png(Image.new("RGB", (64, 32)))}
    await client.post("/v1/img2img", data={"class_label": "7", "model": "imagenet"}, files=files)
    spec = taken(worker)
    assert (spec.class_label, spec.width, spec.height) == (7, 64, 32)


@pytest.mark.parametrize("as_form", [False, True], ids=["json", "form"])
async def test_a_layout(client: httpx.AsyncClient, worker: WorkerBroker, as_form: bool) -> None:
    if as_form:
        answer = await client.post("/v1/txt2img", data={"layout": json.dumps(OBJECTS)}, files={"unused": b""})
        assert answer.json()["errors"][0]["pointer"] == "/unused"
        fields = {"layout": (None, json.dumps(OBJECTS))}
        answer = await client.post("/v1/txt2img", files=fields)
    else:
        answer = await client.post("/v1/txt2img", json={"layout": OBJECTS})
    assert answer.status_code == 202, answer.text
    spec = taken(worker)
    assert spec.model == "layout"
    assert spec.layout == (
        LayoutObject(label=5, box=(0.1, 0.0, 0.4, 0.5)),
        LayoutObject(label=19, box=(0.5, 0.5, 0.5, 0.5), group=True),
    )
    assert JobSpec.from_json(spec.to_json()) == spec
    request = answer.json()["request"]
    assert (await client.post("/v1/txt2img", json=request)).status_code == 202
    assert taken(worker).layout == spec.layout


@pytest.mark.parametrize("mode", ["L", "P"])
async def test_a_semantic_map_keeps_its_values(
    client: httpx.AsyncClient, worker: WorkerBroker, settings: Settings, mode: str
) -> None:
    answer = await client.post("/v1/txt2img", files={"semantic_map": png(map_of(181, mode))}, data={"height": "32"})
    assert answer.status_code == 202, answer.text
    assert "semantic_map" not in answer.json()["request"]
    assert "width" not in answer.json()["request"]
    spec = taken(worker)
    assert (spec.model, spec.width, spec.height) == ("semantic", 64, 32)
    stored = Image.open(Path(settings.store_url.removeprefix("file:")) / spec.inputs["semantic_map"])
    assert (stored.mode, stored.getpixel((0, 0)), stored.getpixel((63, 31))) == ("L", 0, 181)


async def test_a_small_palette_keeps_its_indices(
    client: httpx.AsyncClient, worker: WorkerBroker, settings: Settings
) -> None:
    (await client.post("/v1/txt2img", files={"semantic_map": four_bits(5, colour=3)})).raise_for_status()
    stored = Image.open(Path(settings.store_url.removeprefix("file:")) / taken(worker).inputs["semantic_map"])
    assert stored.getextrema() == (5, 5)


async def test_a_model_that_takes_nothing(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    (await client.post("/v1/txt2img", json={"model": "faces", "seed": 1})).raise_for_status()
    assert taken(worker).model == "faces"
    answer = await client.post("/v1/txt2img", json={"seed": 1})
    assert answer.status_code == 422, "who forgets the prompt does not get a face"


@pytest.mark.parametrize(
    ("body", "where", "words"),
    [
        ({"model": "darkroom-small"}, "/prompt", "required: darkroom-small takes a prompt"),
        ({"model": "imagenet"}, "/class_label", "takes a class_label from 0 to 999"),
        ({"model": "imagenet", "class_label": 1000}, "/class_label", "expected 0 to 999 for imagenet; got 1000"),
        ({"model": "imagenet", "class_label": 1, "prompt": "a dog"}, "/prompt", "takes a class_label from 0 to 999"),
        (
            {"model": "imagenet", "class_label": 1, "negative_prompt": "a dog"},
            "/negative_prompt",
            "takes a class_label",
        ),
        ({"model": "darkroom-small", "prompt": "a", "class_label": 1}, "/class_label", "takes a prompt"),
        ({"model": "darkroom-small", "prompt": "a", "layout": OBJECTS}, "/layout", "takes a prompt"),
        ({"model": "faces", "prompt": "a face"}, "/prompt", "takes nothing that says what the picture shows"),
        ({"model": "layout"}, "/layout", "takes a layout of up to 3 objects with labels from 0 to 19"),
        ({"model": "layout", "layout": OBJECTS * 2}, "/layout", "expected at most 3 objects for layout; got 4"),
        (
            {"layout": [OBJECTS[0], {"label": 20, "box": [0, 0, 1, 1]}]},
            "/layout/1/label",
            "expected 0 to 19 for layout; got 20",
        ),
        ({"layout": [{"label": 1, "box": [0, 0, 0, 1]}]}, "/layout/0/box/2", "greater than 0"),
        ({"layout": [{"label": 1, "box": [0, 0, 1]}]}, "/layout/0/box/3", "required"),
        ({"layout": [{"label": 1, "box": [0, 0, 1, 1], "depth": 2}]}, "/layout/0/depth", "not permitted"),
        ({"model": "semantic"}, "/semantic_map", "takes a semantic_map with classes from 0 to 181"),
        ({"model": "semantic", "prompt": "a sea"}, "/semantic_map", "required"),
    ],
)
async def test_what_a_model_does_not_take(
    client: httpx.AsyncClient, worker: WorkerBroker, body: dict[str, Any], where: str, words: str
) -> None:
    answer = await client.post("/v1/txt2img", json=body)
    assert answer.status_code == 422, answer.text
    found = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert words in found[where], found
    assert worker.take(8) == []


@pytest.mark.parametrize(
    ("file", "fields", "where", "words"),
    [
        (png(map_of(182)), {}, "/semantic_map", "has class 182; expected 0 to 181 for semantic"),
        (png(map_of(3)), {"width": "128"}, "/width", "the semantic_map's 64; got 128"),
        (png(map_of(3), "JPEG"), {}, "/semantic_map", "a JPEG file, which blurs classes; expected a PNG file"),
        (
            png(map_of(3).convert("RGB")),
            {},
            "/semantic_map",
            "colour type 2 with 8 bits per channel; expected 8-bit grey",
        ),
        (png(Image.new("I;16", (64, 32))), {}, "/semantic_map", "colour type 0 with 16 bits per channel; expected"),
        (four_bits(3), {}, "/semantic_map", "colour type 0 with 4 bits per channel; expected 8-bit grey"),
        (png(Image.new("L", (520, 64))), {}, "/semantic_map", "expected at most 512×512"),
        (b"map", {}, "/semantic_map", "not a picture"),
    ],
)
async def test_semantic_maps_that_are_none(
    client: httpx.AsyncClient, worker: WorkerBroker, file: bytes, fields: dict[str, str], where: str, words: str
) -> None:
    answer = await client.post("/v1/txt2img", files={"semantic_map": file}, data={"model": "semantic"} | fields)
    assert answer.status_code == 422, answer.text
    found = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert list(found) == [where]
    assert words in found[where]
    assert worker.take(8) == []


async def test_upscaling_needs_no_prompt(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    """Whether the model reads text or not."""
    answer = await client.post("/v1/upscale", files={"image": png(Image.new("RGB", (16, 16)))})
    assert answer.status_code == 202, answer.text
    assert taken(worker).prompt == ""


async def test_models_tell_what_they_take(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
    told = {name: (one["conditioning"], one["classes"], one["max_objects"]) for name, one in models.items()}
    assert told == {
        "darkroom-small": ("text", None, None),
        "darkroom-small-x4": ("text", None, None),
        "plain-x4": ("text", None, None),
        "imagenet": ("class", 1000, None),
        "layout": ("layout", 20, 3),
        "semantic": ("semantic", 182, None),
        "faces": ("none", None, None),
    }
