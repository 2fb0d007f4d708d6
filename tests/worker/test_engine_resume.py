"""A row goes on from any step, in another engine, with the very same bits."""

import random
from collections.abc import Mapping

import pytest
import torch
from PIL import Image

from models.latent_diffusion import LatentDiffusion
from models.samplers import SAMPLERS, Sampler
from models.tasks import PictureRequest, Task
from tests.tiny_models import BASE, UPSCALER
from worker.engine.engine import Engine
from worker.engine.events import RowFinished, RowProgress
from worker.engine.resume import ResumeState

Models = Mapping[str, LatentDiffusion]
Wanted = dict[str, tuple[str, PictureRequest]]
TASKS: tuple[Task, ...] = ("txt2img", "txt2img", "img2img", "inpaint", "upscale")
PROMPTS = ("a pizza on a blue background", "two red cats", "", "a house")


def engine_of(models: Models, fingerprint: str = "f", capacity: float = 1e6) -> Engine:
    return Engine(models, buckets=(8,), batching="exact", capacity=capacity, fingerprint=fingerprint)


def finish(engine: Engine, wanted: Wanted, resume: Mapping[str, ResumeState] = {}) -> dict[str, bytes]:
    """All rows in the order given, in one engine."""
    made: dict[str, bytes] = {}
    for name, (model, request) in wanted.items():
        engine.submit(name, model, request, resume=resume.get(name))
    while not engine.idle:
        made |= {event.row_id: event.image.tobytes() for event in engine.tick() if isinstance(event, RowFinished)}
    return made


def mixed(count: int, picture: Image.Image, mask: Image.Image) -> Wanted:
    """Tasks, sizes, steps, guidance, samplers, eta, prompts and seeds at random, always the same ones."""
    rng = random.Random(5)
    wanted: Wanted = {}
    for number in range(count):
        task: Task = rng.choice(TASKS)
        side = rng.choice((32, 64, 72))
        fields = {"width": side, "height": 64, "strength": 1.0}
        if task in ("img2img", "inpaint"):
            fields = {"width": picture.width, "height": picture.height, "strength": rng.choice((0.5, 1.0))}
        if task == "upscale":
            fields = {"width": 4 * picture.width, "height": 4 * picture.height, "strength": 1.0}
        request = PictureRequest(
            task,
            rng.choice(PROMPTS),
            int(fields["width"]),
            int(fields["height"]),
            seed=rng.randrange(1000),
            steps=rng.randint(2, 7),
            guidance_scale=rng.choice((0.0, 1.0, 2.0, 5.0)),
            negative_prompt=rng.choice(PROMPTS),
            sampler=rng.choice(SAMPLERS),
            eta=rng.choice((0.0, 0.0, 0.5, 1.0)),
            strength=fields["strength"],
            image=None if task == "txt2img" else picture,
            mask=mask if task == "inpaint" else None,
            noise_level=rng.choice((0, 20)) if task == "upscale" else 0,
        )
        wanted[f"row{number}"] = (UPSCALER if task == "upscale" else BASE, request)
    return wanted


def test_32_mixed_pictures_are_the_same_bytes_alone_in_company_and_after_a_resume(
    models: Models, picture: Image.Image, mask: Image.Image
) -> None:
    wanted = mixed(32, picture, mask)
    alone = {name: finish(engine_of(models), {name: one})[name] for name, one in wanted.items()}
    assert len(set(alone.values())) == 32

    names = list(wanted)
    random.Random(1).shuffle(names)
    together = finish(engine_of(models), {name: wanted[name] for name in names})
    assert together == alone

    assert moved_about(models, wanted) == alone


def moved_about(models: Models, wanted: Wanted) -> dict[str, bytes]:
    """Every few ticks all rows go on in another engine, through bytes."""
    rng = random.Random(2)
    made: dict[str, bytes] = {}
    states: dict[str, ResumeState] = {}
    resumed = set()
    while len(made) < len(wanted):
        engine = engine_of(models)
        for name in rng.sample([name for name in wanted if name not in made], len(wanted) - len(made)):
            engine.submit(name, *wanted[name], resume=states.get(name))
        for _ in range(rng.randint(5, 20)):
            made |= {event.row_id: event.image.tobytes() for event in engine.tick() if isinstance(event, RowFinished)}
        for name in wanted:
            if (state := engine.snapshot(name)) is not None:
                states[name] = ResumeState.from_bytes(state.to_bytes())
                resumed.add((name, state.step))
    assert len({step for _, step in resumed}) > 3
    return made


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_where_it_was(models: Models, sampler: Sampler) -> None:
    """Instead of beginning anew, which would give the same picture, later."""
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=5, sampler=sampler)
    first, second = engine_of(models), engine_of(models)
    first.submit("a", BASE, request)
    while (state := first.snapshot("a")) is None or state.step < 2:
        first.tick()
    second.submit("a", BASE, request, resume=ResumeState.from_bytes(state.to_bytes()))
    events = []
    while not second.idle:
        events += second.tick()
    assert [event.step for event in events if isinstance(event, RowProgress)] == [3, 4, 5]
    made = {event.row_id: event.image.tobytes() for event in events if isinstance(event, RowFinished)}
    assert made == finish(engine_of(models), {"a": (BASE, request)})


def test_a_picture_whose_steps_are_done_is_only_decoded(models: Models) -> None:
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=3, eta=1.0)
    engine = engine_of(models)
    engine.submit("a", BASE, request)
    while (state := engine.snapshot("a")) is None or state.step < 3:
        engine.tick()
    other = engine_of(models)
    other.submit("a", BASE, request, resume=state)
    events = other.tick()
    assert not [event for event in events if isinstance(event, RowProgress)]
    assert [event.image.tobytes() for event in events if isinstance(event, RowFinished)] == [
        finish(engine_of(models), {"a": (BASE, request)})["a"]
    ]


@pytest.mark.parametrize(
    "state",
    [
        ResumeState("other", 2, torch.zeros(4, 8, 8)),
        ResumeState("f", 2, torch.zeros(4, 8, 9)),
        ResumeState("f", 9, torch.zeros(4, 8, 8)),
    ],
    ids=["another worker's", "another size", "more steps than asked"],
)
def test_a_state_that_does_not_fit_is_left(models: Models, state: ResumeState) -> None:
    wanted: Wanted = {"a": (BASE, PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=3))}
    assert finish(engine_of(models), wanted, {"a": state}) == finish(engine_of(models), wanted)


def test_snapshots_of_rows_that_have_not_begun(models: Models) -> None:
    engine = engine_of(models, capacity=1)
    state = ResumeState("f", 2, torch.zeros(4, 8, 8))
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=3)
    engine.submit("first", BASE, request)
    engine.tick()
    engine.submit("new", BASE, request)
    engine.submit("resumed", BASE, request, resume=state)
    assert engine.snapshot("never") is None
    assert engine.snapshot("new") is None
    assert engine.snapshot("resumed") is state


def test_a_state_without_the_history_that_its_sampler_needs_is_left(models: Models) -> None:
    request = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=4, sampler="dpmpp_2m")
    wanted: Wanted = {"a": (BASE, request)}
    state = ResumeState("f", 2, torch.zeros(4, 8, 8))
    assert finish(engine_of(models), wanted, {"a": state}) == finish(engine_of(models), wanted)


@pytest.mark.parametrize("clean", [None, torch.randn(4, 8, 5)])
def test_a_state_survives_its_bytes(clean: torch.Tensor | None) -> None:
    state = ResumeState("finger", 7, torch.randn(4, 8, 5), clean)
    read = ResumeState.from_bytes(state.to_bytes())
    assert (read.fingerprint, read.step) == ("finger", 7)
    assert torch.equal(read.x, state.x)
    assert read.clean is None if clean is None else torch.equal(read.clean, clean)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\xff\xff\xff\xff{}", b"\x02\0\0\0{}", b"\x02\0\0\0[]abcd"])
def test_damaged_states_are_refused(damage: bytes) -> None:
    with pytest.raises(ValueError, match="no resume state"):
        ResumeState.from_bytes(damage)


@pytest.mark.parametrize("cut", [1, 4, 100])
def test_shortened_states_are_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="no resume state"):
        ResumeState.from_bytes(ResumeState("f", 1, torch.zeros(4, 8, 8)).to_bytes()[:-cut])
