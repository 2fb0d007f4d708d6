"""Text, class-conditional, layout, semantic, unconditional and other models in one engine, and blended inpainting."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.layout import LayoutObject
from models.tasks import PictureRequest
from tests.models.families import FAMILIES, family
from worker.engine.bank import Bank
from worker.engine.engine import Engine
from worker.engine.events import Event, LaneTicked, RowFinished, RowProgress
from worker.engine.numerics import probe, scatter_at_random
from worker.engine.resident import ResidentModel
from worker.engine.resume import ResumeState
from worker.engine.scheduler import LaneKey

MODELS = {name: family(name) for name in FAMILIES}
OBJECTS = (LayoutObject(1, (0.1, 0.2, 0.5, 0.6)), LayoutObject(3, (0.4, 0.0, 0.6, 0.3), inside=True))
IMAGE = Image.merge("RGB", [Image.linear_gradient("L").resize((64, 64)).rotate(turn) for turn in (0, 90, 180)])
MASK = Image.new("L", (64, 64))
MASK.paste(255, (10, 0, 40, 50))
MAP = Image.fromarray(np.random.default_rng(0).integers(0, 7, (64, 64), dtype=np.uint8), "L")


def request(task: Any = "txt2img", **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 64, "seed": 3, "steps": 4}
    return PictureRequest(task=task, **(fields | changes))


REQUESTS: dict[str, tuple[str, PictureRequest]] = {
    "text": ("text2im", request(guidance_scale=3.0)),
    "text blended": ("text2im", request("inpaint", image=IMAGE, mask=MASK, guidance_scale=3.0, eta=1.0, steps=6)),
    "text blended too": ("text2im", request("inpaint", image=IMAGE.rotate(90), mask=MASK, seed=5, sampler="dpmpp_2m")),
    "class": ("class", request(class_label=1, guidance_scale=3.0)),
    "another class": ("class", request(class_label=4, guidance_scale=2.0, eta=1.0, steps=6)),
    "class unguided": ("class", request(class_label=2, guidance_scale=1.0)),
    "class copied": ("class", request("img2img", class_label=2, image=IMAGE, strength=0.5, steps=6)),
    "layout": ("layout", request(layout=OBJECTS)),
    "empty layout": ("layout", request(eta=0.5)),
    "semantic": ("semantic", request(semantic_map=MAP)),
    "another map": ("semantic", request(semantic_map=MAP.rotate(90), sampler="euler", steps=3)),
    "face": ("celeba", request(eta=1.0)),
    "another face": ("celeba", request(seed=4, guidance_scale=9.0, steps=7)),
    "face inpainted": ("celeba", request("inpaint", image=IMAGE, mask=MASK, strength=0.7, sampler="euler_ancestral")),
    "hole": ("inpainting_big", request("inpaint", image=IMAGE, mask=MASK)),
    "larger": ("super_resolution", request("upscale", image=IMAGE, width=256, height=256, eta=1.0)),
}


def pictures(events: list[Event]) -> dict[str, Image.Image]:
    return {event.row_id: event.image for event in events if isinstance(event, RowFinished)}


def distance(one: Image.Image, other: Image.Image) -> int:
    """Largest difference in levels."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def test_each_row_equals_the_picture_made_alone() -> None:
    engine = Engine(MODELS, buckets=(1, 2, 4))
    for name, (model, one) in REQUESTS.items():
        engine.submit(name, model, one)
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    made = pictures(events)
    alone = {name: MODELS[model].render(one) for name, (model, one) in REQUESTS.items()}
    assert {name: distance(made[name], alone[name]) for name in alone} == pytest.approx(dict.fromkeys(alone, 0), abs=1)
    lanes = {event.lane: event.rows for event in events if isinstance(event, LaneTicked)}
    assert {key.model for key in lanes if key.guided} == {"text2im", "class"}
    assert {key.model for key in lanes if key.blends} == {"text2im", "celeba"}
    together = [event.rows for event in events if isinstance(event, LaneTicked) and event.lane.model == "celeba"]
    assert max(together) == 2


@pytest.mark.parametrize("name", ["text blended", "text blended too"])
def test_a_blended_picture_goes_on_elsewhere(name: str) -> None:
    model, one = REQUESTS[name]
    whole, broken, other = (Engine({model: MODELS[model]}, buckets=(2,), fingerprint="same") for _ in range(3))
    whole.submit("row", model, one)
    broken.submit("row", model, one)
    steps = 0
    while steps < 2:
        steps += sum(isinstance(event, RowProgress) for event in broken.tick())
    state = broken.snapshot("row")
    assert state is not None
    other.submit("row", model, one, resume=ResumeState.from_bytes(state.to_bytes()))
    results = []
    for engine in (whole, other):
        events: list[Event] = []
        while not engine.idle:
            events += engine.tick()
        results.append(pictures(events)["row"])
    assert distance(*results) == 0


def test_lanes_that_blend_are_lanes_of_their_own() -> None:
    plain = LaneKey("m", 8, 8, guided=True)
    assert plain.label != LaneKey("m", 8, 8, guided=True, blends=True).label


def test_a_request_without_what_its_model_takes_is_refused_at_once() -> None:
    engine = Engine({"class": MODELS["class"]})
    with pytest.raises(ValueError, match="class_label=None: expected 0 to 5"):
        engine.submit("row", "class", request())
    assert engine.idle


@pytest.mark.parametrize(("name", "guided"), [("celeba", False), ("class", True), ("text2im", True)])
def test_rows_that_blend_are_proven_exact(name: str, guided: bool) -> None:
    """A probe that left the blends at zero would prove nothing: then every row would come out as zeros."""
    resident = ResidentModel(MODELS[name])
    key = LaneKey(name, 16, 16, guided=guided, blends=True)
    groups = probe(resident, key, (1, 2, 4))  # raises where a row depends on its slot or its neighbours
    assert sorted(bucket for group in groups for bucket in group) == [1, 2, 4]
    bank = Bank(resident, key, 2)
    scatter_at_random(resident, bank)
    assert bank.blend is not None
    assert all(tensor.std() > 0.5 for tensor in bank.blend)
