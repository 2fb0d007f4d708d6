"""The shipped models behind HTTP, as the demo uses them: one picture of each task at its default settings."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from cli.client import DarkroomClient
from cli.server import SHIPPED_MODELS
from cli.stack import Stack, StackConfig
from contract.spec import Task

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
PROMPT = "a pizza on a blue background"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DarkroomClient]:
    config = StackConfig(tmp_path_factory.mktemp("stack"), WEIGHTS, SHIPPED_MODELS)
    with Stack(config) as stack, DarkroomClient(stack.url) as connected:
        yield connected


def make(client: DarkroomClient, task: Task, fields: dict[str, Any], **pictures: bytes) -> bytes:
    job = client.submit(task, fields, **pictures)
    for _ in client.follow(job):
        pass
    return client.download(client.result(job).images[0])


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_one_picture_of_each_task(client: DarkroomClient) -> None:
    data = make(client, Task.TXT2IMG, {"prompt": PROMPT, "seed": 7})
    image = opened(data)
    assert image.size == (128, 128)
    red, _, blue = image.resize((1, 1), box=(0, 0, 16, 16)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    assert blue > red + 50, "the corner of the picture should be blue"
    assert make(client, Task.TXT2IMG, {"prompt": PROMPT, "seed": 7}) == data
    assert make(client, Task.TXT2IMG, {"prompt": PROMPT, "seed": 8}) != data

    mask = Image.new("L", image.size)
    mask.paste(255, (32, 32, 96, 96))
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    prompt = {"prompt": "a panda on a blue background", "seed": 3}
    painted = opened(make(client, Task.INPAINT, prompt, image=data, mask=buffer.getvalue()))
    box = ImageChops.difference(painted, image).getbbox()
    assert box is not None
    assert box[0] >= 32
    assert box[1] >= 32
    assert box[2] <= 96
    assert box[3] <= 96
    assert opened(make(client, Task.UPSCALE, {"seed": 3}, image=data)).size == (512, 512)
