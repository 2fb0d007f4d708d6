"""The documents round-trip exactly; the names are closed sets without doubles."""

import inspect
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from contract import keys, metrics
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.events import FailedEvent, JobEvent, ProgressEvent, QueuedEvent, SucceededEvent, parse_event
from contract.settings import Settings
from contract.spec import (
    MAX_SEED,
    REQUIRED_INPUTS,
    JobError,
    JobResult,
    JobSpec,
    JobWarning,
    LoraUse,
    OutputFormat,
    PictureResult,
    Priority,
    Sampler,
    Task,
    Timings,
    UnsupportedVersionError,
)
from models.samplers import SAMPLERS

SMALL: dict[str, Any] = {
    "id": "j1", "task": "txt2img", "model": "tiny", "width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0,
    "seed": 1, "created_at": 0.0,
}  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    task = draw(st.sampled_from(Task))
    return JobSpec(
        id=draw(st.from_regex(r"\A[A-Za-z0-9_-]{1,40}\Z")),
        task=task,
        model="tiny",
        prompt=draw(st.text(max_size=50)),
        width=draw(st.integers(1, 16384)),
        height=64,
        steps=draw(st.integers(1, 1000)),
        guidance_scale=draw(st.floats(0, 100)),
        eta=draw(st.floats(0, 1)),
        seed=draw(st.integers(0, MAX_SEED)),
        strength=draw(st.floats(0, 1, exclude_min=True)),
        loras=tuple(LoraUse(name=name, weight=draw(st.floats(-4, 4))) for name in draw(st.sets(st.sampled_from("ab")))),
        priority=draw(st.sampled_from(Priority)),
        deadline_seconds=draw(st.none() | st.floats(0.001, 1e6)),
        output_format=draw(st.sampled_from(OutputFormat)),
        inputs={name: keys.input_object("j1", name) for name in REQUIRED_INPUTS[task]},
        created_at=draw(st.floats(0, 4e9)),
        api_key_id=draw(st.none() | st.just("k1")),
    )


@settings(deadline=None, max_examples=60)
@given(specs())
def test_a_spec_survives_its_json_exactly(spec: JobSpec) -> None:
    assert JobSpec.from_json(spec.to_json()) == spec
    assert JobSpec.from_json(json.dumps(json.loads(spec.to_json()))) == spec  # as RQ stores it


@pytest.mark.parametrize("version", ["2", "2.1", None, 10])
def test_another_major_version_is_one_clear_error(version: object) -> None:
    with pytest.raises(UnsupportedVersionError, match="major version 1"):
        JobSpec.from_json(json.dumps({**SMALL, "version": version, "from_the_future": True}))
    with pytest.raises(UnsupportedVersionError):
        JobResult.from_json(json.dumps({"pictures": [], "version": version}))


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1}, {"steps": 0}, {"guidance_scale": float("nan")}, {"guidance_scale": float("inf")}, {"seed": -1},
        {"seed": 2**63}, {"n": 0}, {"width": 0}, {"strength": 0.0}, {"sampler": "heun"}, {"model": "../x"},
        {"id": "a:b"}, {"inputs": {"image": "x"}}, {"task": "inpaint", "inputs": {"image": "x"}}, {"eta": 1.5},
        {"eta": 0.5, "sampler": "euler"},
    ],
)  # fmt: skip
def test_what_a_spec_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobSpec(**{**SMALL, **change})


def test_specs_are_frozen_and_seeds_wrap() -> None:
    spec = JobSpec(**{**SMALL, "seed": MAX_SEED})
    with pytest.raises(ValidationError):
        spec.seed = 3  # type: ignore[misc]
    assert [spec.picture_seed(i) for i in range(2)] == [MAX_SEED, 0]


def test_events_and_results_survive_their_json() -> None:
    picture = PictureResult(
        index=0, seed=MAX_SEED, key="outputs/j/e/0.png", width=8, height=8, content_type="image/png", bytes=9,
        sha256="a" * 64,
    )  # fmt: skip
    warning = JobWarning(code="unknown_words", message="not in the vocabulary: zebra")
    result = JobResult(pictures=(picture,), timings=Timings(denoise=0.1), warnings=(warning,))
    assert JobResult.from_json(result.to_json()) == result
    events: list[JobEvent] = [
        QueuedEvent(reason="abandoned"),
        ProgressEvent(step=1, steps=2),
        SucceededEvent(result=result),
        FailedEvent(error=JobError(code=ErrorCode.EXPIRED, detail="too late")),
    ]
    for event in events:
        assert parse_event(event.model_dump_json()) == event
        assert parse_event(json.dumps({**event.model_dump(mode="json"), "from_the_future": 1})) == event
    with pytest.raises(ValidationError):
        parse_event('{"type": "vanished"}')


def card(**changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "name": "tiny", "tasks": ["upscale"], "default_width": 64, "default_height": 64, "max_width": 64,
        "max_height": 64, "size_multiple": 8, "latent_downsample": 4, "default_steps": {"upscale": 4},
        "default_guidance": {"upscale": 1.0}, "upscale_factor": 4,
    }  # fmt: skip
    return ModelCard.model_validate({**fields, **changes})


def test_a_card_covers_its_tasks() -> None:
    assert ModelCard.model_validate_json(card().model_dump_json()) == card()
    with pytest.raises(ValidationError, match="default_steps has entries"):
        card(default_steps={})
    with pytest.raises(ValidationError, match="upscale_factor"):
        card(upscale_factor=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"default_noise_level": 20}, "go together"),
        ({"max_noise_level": 350}, "go together"),
        ({"default_noise_level": 21, "max_noise_level": 20}, "at most max_noise_level, 20"),
        ({"default_noise_level": 0, "max_noise_level": 1000}, "less than or equal to 999"),
        (
            {
                "tasks": ["txt2img"], "default_steps": {"txt2img": 4}, "default_guidance": {"txt2img": 1.0},
                "upscale_factor": None, "default_noise_level": 0, "max_noise_level": 9,
            },
            "that upscale alone",
        ),
    ],
)  # fmt: skip
def test_noise_levels_of_a_card(changes: dict[str, Any], words: str) -> None:
    assert card(default_noise_level=20, max_noise_level=20).max_noise_level == 20
    with pytest.raises(ValidationError, match=words):
        card(**changes)


def test_error_codes_carry_status_and_summary() -> None:
    assert JobError(code="queue_full", detail="").code is ErrorCode.QUEUE_FULL
    assert len({code.value for code in ErrorCode}) == len(ErrorCode)
    for code in ErrorCode:
        assert 400 <= code.status < 600
        assert code.summary
    assert JobError(code=ErrorCode.EXPIRED, detail="x").model_dump(mode="json") == {"code": "expired", "detail": "x"}


def test_keys_never_collide() -> None:
    same = {"job_id": "x", "api_key_id": "x", "model": "x", "name": "x", "idempotency_key": "x", "metric": "x"}
    same |= {"execution_id": "e", "extension": "png", "queue": "x", "worker_name": "x"}
    made = {}
    for name, function in inspect.getmembers(keys, inspect.isfunction):
        if function.__module__ == keys.__name__ and name not in {"queue_names", "queue_name", "counter", "file_name"}:
            parameters = inspect.signature(function).parameters
            made[name] = function(**{key: 0 if key == "index" else same[key] for key in parameters})
    assert len(set(made.values())) == len(made)
    assert keys.queue_names("m") == ["darkroom:v1:m:interactive", "darkroom:v1:m:batch"]
    assert keys.idempotency(None, "a") != keys.idempotency("b", "a")
    assert keys.output_object("j", "e", 0, "png") == "outputs/j/e/0.png"
    assert keys.input_object("j", "mask") == "inputs/j/mask.png"
    assert keys.file_name(keys.output_object("j", "e", 0, "png")) == "j-0.png"
    assert keys.file_name(keys.input_object("j", "mask")) is None


def test_every_metric_stands_once() -> None:
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    listed = [value for value in vars(metrics).values() if isinstance(value, metrics.Metric)]
    assert sorted(listed, key=lambda metric: metric.name) == sorted(metrics.ALL, key=lambda metric: metric.name)
    for metric in metrics.ALL:
        assert metric.name.startswith("darkroom_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_QUEUE_DEPTH", "7")
    monkeypatch.setenv("DARKROOM_API_KEYS", "key-1, key-2,")
    read = Settings()
    assert read.max_queue_depth == 7
    assert [key.get_secret_value() for key in read.api_keys] == ["key-1", "key-2"]
    assert "key-1" not in repr(read)
    monkeypatch.setenv("DARKROOM_MAX_QUEUE_DEPTH", "0")
    with pytest.raises(ValidationError):
        Settings()


def test_half_of_the_held_bytes_is_a_body_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_BODY_BYTES", "200000000")
    with pytest.raises(ValidationError, match="expected at least 400,000,000, twice DARKROOM_MAX_BODY_BYTES"):
        Settings()
    monkeypatch.setenv("DARKROOM_MAX_HELD_BYTES", "400000000")
    assert Settings().max_held_bytes == 400_000_000
    monkeypatch.setenv("DARKROOM_MAX_BODY_BYTES", "many")
    with pytest.raises(ValidationError, match="max_body_bytes"):
        Settings()


def test_samplers_are_those_of_the_models() -> None:
    assert [one.value for one in Sampler] == list(SAMPLERS)


def test_a_spec_names_each_adapter_once() -> None:
    loras = tuple(LoraUse(name=name) for name in ("film", "neon", "film"))
    fields = {
        "id": "j",
        "task": "txt2img",
        "model": "m",
        "width": 8,
        "height": 8,
        "steps": 1,
        "guidance_scale": 1,
        "seed": 0,
        "created_at": 0,
    }
    assert JobSpec.model_validate(fields | {"loras": loras[:2]}).loras == loras[:2]
    with pytest.raises(ValueError, match="loras film: expected each once"):
        JobSpec.model_validate(fields | {"loras": loras})
