"""Pictures as an enemy sends them become a job that its worker can run, or a refusal that says why; nothing else.

A small run; `make fuzz` does it at size, against real workers.
"""

import asyncio
import io
from base64 import b64encode
from contextlib import suppress

import httpx
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from broker.store import Store
from broker.worker_side import WorkerBroker
from contract.settings import Settings
from service.problems import ProblemError
from service.uploads import Picture, Uploads
from tests.hostile import SIZE, hostile_files, whole_files
from worker.requests import load_inputs

PROMPT = "a pizza on a blue background"
NAMES = st.sampled_from(("image", "mask", "semantic_map"))


def taken(data: bytes, name: str) -> Picture | None:
    """None where it was refused."""

    async def decode() -> Picture:
        return (await Uploads(4096, 2048 * 2048, 64).decode({name: data}))[name]

    try:
        return asyncio.run(decode())
    except ProblemError as error:
        problem = error
    assert problem.code.status == 422
    assert "expected" in problem.errors[0].detail
    assert "object at 0x" not in problem.errors[0].detail
    return None


def test_whole_files_are_taken() -> None:
    for data in whole_files():
        picture = taken(data, "image")
        assert picture is not None
        assert (picture.width, picture.height) == SIZE


@hypothesis_settings(max_examples=300, deadline=None, database=None)
@given(data=hostile_files(), name=NAMES)
def test_every_file_is_taken_or_refused(data: bytes, name: str) -> None:
    picture = taken(data, name)
    if picture is None:
        return
    with Image.open(io.BytesIO(picture.png), formats=["PNG"]) as image:
        image.load()
        assert (image.mode, image.size) == ("RGB" if name == "image" else "L", (picture.width, picture.height))
    told = None
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:  # it may stumble over what we leave out
        told = image.size
    assert told is None or sorted(told) == sorted((picture.width, picture.height))


@hypothesis_settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=hostile_files(), name=st.sampled_from(("image", "mask")), form=st.booleans())
async def test_what_a_gateway_takes_a_worker_can_read(
    client: httpx.AsyncClient, worker: WorkerBroker, settings: Settings, data: bytes, name: str, form: bool
) -> None:
    whole = whole_files()[0]
    pictures = {"image": whole, "mask": whole} | {name: data}
    if form:
        answer = await client.post("/v1/inpaint", data={"prompt": PROMPT}, files=pictures)
    else:
        texts = {key: b64encode(value).decode() for key, value in pictures.items()}
        answer = await client.post("/v1/inpaint", json={"prompt": PROMPT, **texts})
    assert answer.status_code in (202, 422), answer.text
    if answer.status_code == 422:
        assert answer.json()["errors"][0]["pointer"].startswith("/")
        return
    (job,) = await asyncio.to_thread(worker.take, 8)
    inputs = load_inputs(Store(settings.store_url), job.spec)
    assert set(inputs) == {"image", "mask"}
    for image in inputs.values():
        image.load()
        assert image.size == (job.spec.width, job.spec.height)
