"""Memory runs out at named moments: nobody but a row that fails alone is lost, and exact pictures stay exact."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.errors import ErrorCode
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from tests.tiny_models import BASE
from worker.engine import runner
from worker.engine.engine import Engine
from worker.engine.events import Event, LaneTicked, RowFailed, RowFinished, RowHandedBack
from worker.engine.memory import Ceiling
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.errors import begin_error

Models = Mapping[str, LatentDiffusion]
EXHAUSTED = torch.OutOfMemoryError("injected")


def request(seed: int, **changes: Any) -> PictureRequest:
    return PictureRequest("txt2img", "a cat", 64, 64, seed=seed, **{"steps": 4, "eta": 1.0, **changes})


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    return events


def pictures(events: list[Event]) -> dict[str, bytes]:
    return {event.row_id: event.image.tobytes() for event in events if isinstance(event, RowFinished)}


def alone(models: Models, one: PictureRequest) -> bytes:
    engine = Engine(models, buckets=(4,), batching="exact")
    engine.submit("a", BASE, one)
    return pictures(run(engine))["a"]


@pytest.fixture
def fail_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`fail_steps(2, 3)` makes the third and fourth call of `runner.step` fail."""

    def arrange(*calls: int, error: Exception = EXHAUSTED) -> None:
        step, count = runner.step, iter(range(10**6))

        def failing(*args: Any) -> None:
            if next(count) in calls:
                raise error
            step(*args)

        monkeypatch.setattr(runner, "step", failing)

    return arrange


def test_exact_tries_the_same_shape_again(models: Models, fail_steps: Callable[..., None]) -> None:
    expected = {f"row{seed}": alone(models, request(seed)) for seed in range(3)}
    fail_steps(1)
    engine = Engine(models, buckets=(4,), batching="exact")
    for seed in range(3):
        engine.submit(f"row{seed}", BASE, request(seed))
    events = run(engine)
    assert not [event for event in events if isinstance(event, RowFailed | RowHandedBack)]
    assert pictures(events) == expected
    assert {event.bucket for event in events if isinstance(event, LaneTicked)} == {4}


def test_exact_hands_the_others_back_and_all_get_their_pictures(
    models: Models, fail_steps: Callable[..., None]
) -> None:
    expected = {f"row{seed}": alone(models, request(seed)) for seed in range(3)}
    fail_steps(2, 3)
    engine = Engine(models, buckets=(4,), batching="exact", capacity=8)
    for seed in range(3):
        engine.submit(f"row{seed}", BASE, request(seed))
    events = run(engine)
    returned = {event.row_id: event.resume for event in events if isinstance(event, RowHandedBack)}
    assert set(returned) == {"row1", "row2"}
    assert engine.free_slots == 1  # half of the three that were held, and a little for the picture that came through
    for seed in (1, 2):
        state = returned[f"row{seed}"]
        assert state is not None
        assert state.step == 2
        engine.submit(f"row{seed}", BASE, request(seed), resume=state)
    events += run(engine)
    assert not [event for event in events if isinstance(event, RowFailed)]
    assert pictures(events) == expected


def test_exact_fails_a_row_that_fails_alone(models: Models, fail_steps: Callable[..., None]) -> None:
    fail_steps(0, 1, 2, 3)
    engine = Engine(models, buckets=(4,), batching="exact")
    engine.submit("first", BASE, request(1))
    engine.submit("second", BASE, request(2))
    events = run(engine)
    assert [event.row_id for event in events if isinstance(event, RowHandedBack)] == ["second"]
    assert [(event.row_id, event.error) for event in events if isinstance(event, RowFailed)] == [("first", EXHAUSTED)]


def test_fast_goes_on_in_halves(models: Models, fail_steps: Callable[..., None]) -> None:
    fail_steps(1)
    engine = Engine(models, buckets=(4,), batching="fast")
    for seed in range(3):
        engine.submit(f"row{seed}", BASE, request(seed))
    events = run(engine)
    assert set(pictures(events)) == {"row0", "row1", "row2"}
    assert not [event for event in events if isinstance(event, RowFailed | RowHandedBack)]


@pytest.mark.parametrize("part", ["decode_latents", "blank_posterior"])
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_decoding_and_preparing_make_room_too(
    models: Models, monkeypatch: pytest.MonkeyPatch, part: str, batching: Any
) -> None:
    expected = {f"row{seed}": alone(models, request(seed)) for seed in range(3)}
    engine = Engine(models, buckets=(4,), batching=batching)
    work, calls = getattr(models[BASE], part), iter(range(10**6))

    def failing(*args: Tensor) -> Tensor:
        if next(calls) == 0:
            raise EXHAUSTED
        result: Tensor = work(*args)
        return result

    monkeypatch.setattr(models[BASE], part, failing)
    for seed in range(3):
        engine.submit(f"row{seed}", BASE, request(seed))
    events = run(engine)
    returned = {event.row_id: event.resume for event in events if isinstance(event, RowHandedBack)}
    assert len(returned) == 2
    for name, state in returned.items():
        engine.submit(name, BASE, request(int(name[-1])), resume=state)
    assert pictures(events + run(engine)) == expected


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Call number `call` of `owner.name` does its work and then fails for lack of memory."""
    work, calls = getattr(owner, name), iter(range(10**6))

    def failing(*args: Any) -> Any:
        result = work(*args)
        if next(calls) == call:
            raise EXHAUSTED
        return result

    monkeypatch.setattr(owner, name, failing)


def test_a_row_that_moved_in_half_leaves_nothing_behind(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(models, request(2))
    engine = Engine(models, buckets=(4,), batching="exact")
    failing_once(monkeypatch, ResidentModel, "own_time", 1)  # the bank has the row by then
    for seed in range(3):
        engine.submit(f"row{seed}", BASE, request(seed))
    events = engine.tick()
    assert {event.row_id for event in events if isinstance(event, RowHandedBack)} == {"row0", "row2"}
    engine.cancel("row1")
    engine.submit("row2", BASE, request(2))
    engine.tick()
    assert [bank.active.sum() for bank in engine._banks.values()] == [1]
    assert pictures(run(engine))["row2"] == expected


def test_a_finished_row_that_finds_no_room_to_leave_its_slot_keeps_its_steps(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Engine(models, buckets=(4,), batching="exact")
    first.submit("a", BASE, request(1))
    while (state := first.snapshot("a")) is None or state.step < 4:
        first.tick()
    engine = Engine(models, buckets=(4,), batching="exact")
    failing_once(monkeypatch, models[BASE], "decoding", 0)
    engine.submit("a", BASE, request(1), resume=state)
    engine.submit("b", BASE, request(2))
    assert [event.row_id for event in engine.tick() if isinstance(event, RowHandedBack)] == ["b"]
    assert pictures(run(engine)) == {"a": alone(models, request(1))}


@pytest.mark.parametrize("error", [EXHAUSTED, ValueError("no such lane")])
def test_a_lane_that_cannot_be_made_leaves_the_engine_as_it_was(models: Models, error: Exception) -> None:
    def buckets(key: LaneKey) -> tuple[int, ...]:
        if key.width > 8:
            raise error
        return (4,)

    engine = Engine(models, buckets=buckets, batching="exact")
    with pytest.raises(type(error)):
        engine.submit("large", BASE, PictureRequest("txt2img", "a cat", 128, 64, seed=1, steps=2))
    assert engine.idle
    assert not engine.cancel("large")
    engine.submit("usual", BASE, request(1))
    assert pictures(run(engine)) == {"usual": alone(models, request(1))}


def test_a_job_whose_lane_does_not_fit_is_told_so() -> None:
    assert begin_error(EXHAUSTED).code is ErrorCode.OUT_OF_MEMORY


def test_a_lost_device_ends_the_process(models: Models, fail_steps: Callable[..., None]) -> None:
    fail_steps(0, error=torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    engine = Engine(models)
    engine.submit("a", BASE, request(1))
    with pytest.raises(torch.AcceleratorError):
        run(engine)


def test_the_ceiling_halves_and_comes_back_slowly() -> None:
    ceiling = Ceiling(8)
    ceiling.ran_out(6.0)
    assert ceiling.value == 3.0
    for _ in range(20):
        ceiling.finished()
    assert ceiling.value == pytest.approx(5.0)
    for _ in range(100):
        ceiling.finished()
    assert ceiling.value == 8
    ceiling.ran_out(1.0)
    assert ceiling.value == 1.0
