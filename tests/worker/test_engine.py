"""Every row of a mixed, changing batch is the picture that `LatentDiffusion.render` makes of it alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from tests.tiny_models import BASE, UPSCALER
from worker.engine.engine import Engine
from worker.engine.events import Event, LaneTicked, NotFiniteError, RowFailed, RowFinished, RowProgress

Models = Mapping[str, LatentDiffusion]


def request(task: Any = "txt2img", **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {
        "prompt": "a pizza on a blue background",
        "width": 64,
        "height": 64,
        "seed": 3,
        "steps": 4,
    }
    return PictureRequest(task=task, **{**fields, **changes})


@pytest.fixture
def requests(picture: Image.Image, mask: Image.Image) -> dict[str, tuple[str, PictureRequest]]:
    """Three tasks and an upscaler, several sizes, steps, guidance scales, etas."""
    small = {"width": picture.width, "height": picture.height, "image": picture}
    base = {
        "plain": request(guidance_scale=3.0),
        "unguided": request(guidance_scale=1.0, seed=4, steps=7),
        "zero": request(guidance_scale=0.0, seed=5),
        "noisy": request(guidance_scale=5.0, eta=1.0, steps=6, seed=6, prompt="two red cats", negative_prompt="a dog"),
        "wide": request(width=90, height=41, guidance_scale=2.0, seed=7),
        "img2img": request("img2img", **small, strength=0.6, steps=5, seed=8, eta=0.5),
        "inpaint": request("inpaint", **small, mask=mask, steps=3, seed=9, guidance_scale=1.0),
        "inpaint guided": request("inpaint", **small, mask=mask, steps=3, strength=0.7, seed=10),
        "copy": request("img2img", image=picture.resize((64, 64)), strength=0.5, seed=11, steps=9),
    }
    large = {"image": picture, "width": 4 * picture.width, "height": 4 * picture.height}
    upscales = {
        "upscale": request("upscale", **large, noise_level=20, guidance_scale=1.0),
        "upscale noisy": request("upscale", **large, noise_level=300, eta=0.3, seed=12, guidance_scale=1.0, steps=5),
        "upscale guided": request("upscale", **large, noise_level=0, guidance_scale=4.0, prompt="a cat"),
    }
    return {name: (BASE, one) for name, one in base.items()} | {name: (UPSCALER, one) for name, one in upscales.items()}


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    return events


def pictures(events: list[Event]) -> dict[str, Image.Image]:
    return {event.row_id: event.image for event in events if isinstance(event, RowFinished)}


def distance(one: Image.Image, other: Image.Image) -> int:
    """Largest difference in levels."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize("buckets", [(1, 2, 4, 8), (4,)])
@pytest.mark.parametrize(("stagger", "shared"), [(0, 3), (2, 2)])
def test_each_row_equals_the_picture_made_alone(
    models: Models, requests: dict[str, tuple[str, PictureRequest]], buckets: tuple[int, ...], stagger: int, shared: int
) -> None:
    engine = Engine(models, buckets=buckets)
    events: list[Event] = []
    for name, (model, one) in requests.items():
        engine.submit(name, model, one)
        for _ in range(stagger):
            events += engine.tick()
    events += run(engine)
    made = pictures(events)
    assert made.keys() == requests.keys()
    alone = {name: models[model].render(one) for name, (model, one) in requests.items()}
    assert {name: distance(made[name], alone[name]) for name in made} == pytest.approx(dict.fromkeys(made, 0), abs=1)
    assert max(event.rows for event in events if isinstance(event, LaneTicked)) >= shared


def test_the_comparison_would_notice_a_mix_up(models: Models) -> None:
    """Prompt, guidance, eta, noise level and steps all change the tiny models' pictures by many levels."""
    plain = request(guidance_scale=3.0)
    variants = [
        request(guidance_scale=3.0, prompt="a cat"),
        request(guidance_scale=3.0, negative_prompt="a cat"),
        request(guidance_scale=4.0),
        request(guidance_scale=3.0, eta=1.0),
        request(guidance_scale=3.0, steps=5),
    ]
    base = models[BASE].render(plain)
    assert min(distance(base, models[BASE].render(one)) for one in variants) > 10


def test_many_rows_share_a_forward_and_queue_for_slots(models: Models) -> None:
    engine = Engine(models, buckets=(1, 2, 4), capacity=6)
    wanted = {f"row{i}": request(seed=i, steps=2 + i % 3, guidance_scale=2.0) for i in range(7)}
    assert engine.free_slots == 6
    for name, one in wanted.items():
        engine.submit(name, BASE, one)
    assert engine.free_slots == 0
    events = run(engine)
    assert engine.free_slots == 6
    ticks = [event for event in events if isinstance(event, LaneTicked)]
    assert {tick.lane.label for tick in ticks} == {"8x8 guided"}
    assert max(tick.rows for tick in ticks) == 4
    assert all(tick.rows <= tick.bucket for tick in ticks)
    assert sum(tick.rows for tick in ticks) == sum(one.steps for one in wanted.values())
    made = pictures(events)
    for name, one in wanted.items():
        assert distance(made[name], models[BASE].render(one)) <= 1


def test_progress_counts_every_step(models: Models) -> None:
    engine = Engine(models, preview_seconds=0.0)
    engine.submit("a", BASE, request(steps=3))
    engine.submit("b", BASE, request("img2img", image=Image.new("RGB", (64, 64)), strength=0.5, steps=6))
    events = run(engine)
    progress = {name: [] for name in "ab"}  # type: dict[str, list[RowProgress]]
    for event in events:
        if isinstance(event, RowProgress):
            progress[event.row_id].append(event)
    for rows in progress.values():
        assert [(one.step, one.steps) for one in rows] == [(1, 3), (2, 3), (3, 3)]
        assert [one.preview.size if one.preview else None for one in rows] == [(8, 8), (8, 8), None]
    (first, _) = (event for event in events if isinstance(event, RowFinished))
    assert first.denoise.begin <= first.denoise.end <= first.decode.begin <= first.decode.end


def test_previews_keep_their_distance(models: Models) -> None:
    now = 0.0

    def clock() -> float:
        return now

    engine = Engine(models, preview_seconds=1.0, clock=clock)
    engine.submit("a", BASE, request(steps=9))
    previews: list[int] = []
    while not engine.idle:
        previews += [event.step for event in engine.tick() if isinstance(event, RowProgress) and event.preview]
        now += 0.4
    assert previews == [4, 7]


def test_preview_resembles_the_picture(models: Models) -> None:
    """Of the second-last step's prediction, against the picture shrunk to the latents' size."""
    engine = Engine(models, preview_seconds=0.0)
    engine.submit("a", BASE, request(steps=8))
    events = run(engine)
    preview = [event.preview for event in events if isinstance(event, RowProgress) and event.preview][-1]
    shrunk = pictures(events)["a"].resize((8, 8), Image.Resampling.BOX)
    error = np.abs(np.asarray(preview, dtype=float) - np.asarray(shrunk, dtype=float)).mean()
    flat = np.abs(np.asarray(shrunk, dtype=float) - 128.0).mean()
    assert error < flat


def test_cancelled_rows_vanish_and_others_do_not_notice(models: Models) -> None:
    engine = Engine(models, buckets=(1, 2, 4))
    stays = request(steps=6, eta=1.0)
    engine.submit("stays", BASE, stays)
    engine.submit("midway", BASE, request(steps=9, seed=1))
    engine.submit("decoding", BASE, request(steps=2, seed=2))
    events = [*engine.tick(), *engine.tick()]
    assert engine.cancel("decoding")
    engine.submit("waiting", BASE, request(width=32))
    assert engine.cancel("waiting")
    events += engine.tick()
    assert engine.cancel("midway")
    assert not engine.cancel("midway")
    assert not engine.cancel("never")
    engine.submit("late", BASE, request(seed=20))
    later = run(engine)
    assert {event.row_id for event in later if not isinstance(event, LaneTicked)} == {"stays", "late"}
    made = pictures(later)
    assert distance(made["stays"], models[BASE].render(stays)) <= 1
    assert distance(made["late"], models[BASE].render(request(seed=20))) <= 1


def failures(events: list[Event]) -> dict[str, tuple[str, type[Exception]]]:
    return {event.row_id: (event.stage, type(event.error)) for event in events if isinstance(event, RowFailed)}


def test_bad_rows_fail_alone(models: Models, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails to prepare, one runs out of range, one breaks every forward pass it is in, one cannot be decoded."""
    denoise, decode = models[BASE].unet.denoise, models[BASE].decode_latents
    poisoned = torch.full((4, 8, 8), 7.0)

    def faulty(x: Tensor, emb: Tensor, kv: Any) -> Tensor:
        if any(torch.equal(row[:4], poisoned) for row in x):
            raise RuntimeError("device-side fault")
        return denoise(x, emb, kv)

    def fussy(latents: Tensor) -> Tensor:
        if latents.shape[-1] == 5:
            raise RuntimeError("no picture of this width")
        return decode(latents)

    monkeypatch.setattr(models[BASE].unet, "denoise", faulty)
    monkeypatch.setattr(models[BASE], "decode_latents", fussy)
    engine = Engine(models, buckets=(1, 2, 4, 8), capacity=64)
    engine.submit("good", BASE, request(eta=1.0))
    engine.submit("misshapen", BASE, request("img2img", image=picture, strength=0.5))
    engine.submit("stepless", BASE, request(steps=0))
    engine.submit("wrong task", BASE, request("upscale", image=picture))
    engine.submit("infinite", BASE, request(guidance_scale=float("inf")))
    engine.submit("poison", BASE, request(seed=66))
    engine.submit("narrow", BASE, request(width=40))
    engine.submit("good too", BASE, request(seed=9, steps=6))
    events = engine.tick()
    slot = [row.id if row else None for row in engine._scheduler.lanes[engine._pictures["poison"].row.lane].slots]
    with torch.inference_mode():
        engine._banks[engine._pictures["poison"].row.lane].x[slot.index("poison")] = poisoned
    events += run(engine)
    assert failures(events) == {
        "misshapen": ("prepare", ValueError),
        "stepless": ("prepare", ValueError),
        "wrong task": ("prepare", ValueError),
        "infinite": ("denoise", NotFiniteError),
        "poison": ("denoise", RuntimeError),
        "narrow": ("decode", RuntimeError),
    }
    monkeypatch.undo()
    made = pictures(events)
    assert distance(made["good"], models[BASE].render(request(eta=1.0))) <= 1
    assert distance(made["good too"], models[BASE].render(request(seed=9, steps=6))) <= 1


def test_submit_refuses_what_has_no_lane(models: Models) -> None:
    engine = Engine(models)
    engine.submit("a", BASE, request())
    with pytest.raises(ValueError, match="row a is in the engine already"):
        engine.submit("a", BASE, request())
    with pytest.raises(ValueError, match="model other is not loaded; loaded: tiny, tiny-x4"):
        engine.submit("b", "other", request())
    with pytest.raises(ValueError, match="needs an image"):
        engine.submit("b", UPSCALER, request("upscale"))
    with pytest.raises(ValueError, match="expected numbers of at least 1"):
        Engine(models, buckets=())


def test_idle_lanes_give_their_memory_back(models: Models) -> None:
    engine = Engine(models)
    for side in range(8, 104, 8):
        engine.submit("a", BASE, request(width=side, steps=1))
        run(engine)
    assert len(engine._banks) <= 9
