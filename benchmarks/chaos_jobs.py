"""Jobs of all kinds for the tiny models, always the same for a seed."""

import io
import random
from typing import Any, Final

from PIL import Image

from broker.store import Store
from contract import keys
from contract.spec import JobSpec, Priority, Task
from tests.tiny_models import BASE, UPSCALER

_SHARED: Final = "shared"
_WORDS: Final = ("a cat", "two dogs", "a pizza", "a red circle on a blue background", "")


def mixed_jobs(count: int, seed: int) -> list[JobSpec]:
    """All tasks and priorities; 5 to 40 steps, guidance from none to strong, eta 0 to 1, 1 to 3 pictures, two sizes."""
    chance = random.Random(seed)
    return [_job(f"chaos-{index}", chance) for index in range(count)]


def _job(job_id: str, chance: random.Random) -> JobSpec:
    task = chance.choice((Task.TXT2IMG, Task.TXT2IMG, Task.IMG2IMG, Task.INPAINT, Task.UPSCALE))
    fields: dict[str, Any] = {
        "id": job_id,
        "task": task,
        "model": BASE,
        "prompt": chance.choice(_WORDS),
        "negative_prompt": chance.choice(("", "", "a dog")),
        "width": 64,
        "height": chance.choice((64, 64, 48)),
        "steps": chance.randint(5, 40),
        "guidance_scale": chance.choice((1.0, 2.0, 5.0)),
        "eta": chance.choice((0.0, 0.0, 0.5, 1.0)),
        "n": chance.choice((1, 1, 1, 2, 3)),
        "seed": chance.randrange(2**31),
        "priority": chance.choice(list(Priority)),
        "created_at": 1_700_000_000.0,
    }
    if task is not Task.TXT2IMG:
        fields["height"] = 64
        fields["inputs"] = {"image": keys.input_object(_SHARED, "small" if task is Task.UPSCALE else "image")}
    if task is Task.INPAINT:
        fields["inputs"]["mask"] = keys.input_object(_SHARED, "mask")
    if task in (Task.IMG2IMG, Task.INPAINT):
        fields["strength"] = chance.choice((0.5, 0.8, 1.0))
    if task is Task.UPSCALE:
        fields |= {"model": UPSCALER, "guidance_scale": 1.0}
    return JobSpec(**fields)


def store_inputs(store: Store) -> None:
    """The pictures that the jobs name."""
    gradient = Image.radial_gradient("L").resize((64, 64))
    picture = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.point(lambda level: 255 - level)))
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 8, 48, 40))
    for name, image in (("image", picture), ("small", picture.resize((16, 16))), ("mask", mask)):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        store.put(keys.input_object(_SHARED, name), buffer.getvalue(), "image/png")
