"""Exact batching: the probe finds what depends on company, and plans keep to buckets of equal bits."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from tests.tiny_models import BASE, UPSCALER
from worker.engine import numerics
from worker.engine.numerics import ExactPlan, NumericsError, fingerprint, powers_of_two, probe, weights_digest
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey

Models = Mapping[str, LatentDiffusion]
CPU = torch.device("cpu")
KEY = LaneKey(BASE, 8, 8, guided=True)


@pytest.fixture
def resident(models: Models) -> ResidentModel:
    return ResidentModel(models[BASE])


def spoil(resident: ResidentModel, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """`change(x)` is added to what the UNet gives."""
    denoise = resident.model.unet.denoise

    def spoiled(x: Tensor, emb: Tensor, kv: Any) -> Any:
        return denoise(x, emb, kv) + change(x)

    monkeypatch.setattr(resident.model.unet, "denoise", spoiled)


@pytest.mark.parametrize("name", [BASE, UPSCALER])
@pytest.mark.parametrize("guided", [False, True])
def test_every_bucket_is_in_one_group(models: Models, name: str, guided: bool) -> None:
    groups = probe(ResidentModel(models[name]), LaneKey(name, 8, 8, guided), (1, 2, 4))
    assert sorted(bucket for group in groups for bucket in group) == [1, 2, 4]


def test_buckets_with_other_bits_form_another_group(resident: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(resident, monkeypatch, lambda x: 1e-3 if x.shape[0] == 4 else 0.0)
    assert (4,) in probe(resident, KEY, (2, 4))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: torch.arange(x.shape[0]).repeat(2)[:, None, None, None] * 1e-3, id="slot"),
        pytest.param(lambda x: x.sum() * 1e-3, id="neighbours"),
    ],
)
def test_a_row_that_depends_on_slot_or_neighbours_is_refused(
    resident: ResidentModel, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    spoil(resident, monkeypatch, change)
    with pytest.raises(NumericsError, match=r"tiny, 8x8 guided: in a batch of 4 .* use batching=fast"):
        probe(resident, KEY, (4,))
    plan = ExactPlan({BASE: resident}, 4, lambda _: None)
    with pytest.raises(NumericsError):
        plan.prove(KEY)
    assert plan(KEY) == (1,)


def test_plans_hold_the_usual_bucket_and_only_its_equals(
    resident: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def groups(_resident: object, _key: object, buckets: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        asked.append(buckets)
        return (1,), buckets[1:]

    monkeypatch.setattr(numerics, "probe", groups)
    plan = ExactPlan({BASE: resident}, 8, lambda key: 2 if key.guided else None)
    assert (plan.usual_bucket(KEY), ExactPlan({BASE: resident}, 1, lambda _: 2).usual_bucket(KEY)) == (2, 1)
    unguided = LaneKey(BASE, 8, 8, guided=False)
    assert (plan(KEY), plan(unguided), plan(unguided)) == ((2, 4, 8), (2, 4, 8), (2, 4, 8))
    assert asked == [(1, 2, 4, 8)] * 2
    sizes = {(64, 32): 4, (64, 64): 2, (4, 4): 8, (128, 128): 1, (33, 32): 4}
    assert {size: plan.usual_bucket(LaneKey(BASE, *size, guided=False)) for size in sizes} == sizes


def test_pinned_threads_are_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert [numerics.pin(wanted) for wanted in (1, 2, 3)] == [1, 2, 2]
        assert torch.get_num_threads() == 2
        assert numerics.pin(None) <= 2
        monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
        with pytest.raises(NumericsError, match="OMP_DYNAMIC is set"):
            numerics.pin(1)
    finally:
        torch.set_num_threads(before)
    assert powers_of_two(6) == (1, 2, 4)


def test_fingerprint_names_what_bits_depend_on(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = weights_digest(models[BASE])
    one = fingerprint(CPU, {BASE: digest}, batching="exact")
    assert one == fingerprint(CPU, {BASE: digest}, batching="exact")
    assert len(one) == 16
    others = {
        fingerprint(CPU, {BASE: weights_digest(models[UPSCALER])}, batching="exact"),
        fingerprint(CPU, {BASE: digest}, batching="fast"),
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert len(others | {one, fingerprint(CPU, {BASE: digest}, batching="exact")}) == 4
