"""A slot that a row has left is as good as new, whatever tensors its lane has."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from tests.models.families import family
from tests.tiny_models import BASE, UPSCALER
from worker.engine.adapters import AdapterBank
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Tuning, tune

SLOTS = 3


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All that a bank holds, however deep; one that is added later is found too."""
    match value:
        case Tensor():
            yield value
        case AdapterBank():
            yield from tensors_of(value.factors)
        case Mapping():
            yield from tensors_of(list(value.values()))
        case list() | tuple():
            for one in value:
                yield from tensors_of(one)


@pytest.mark.parametrize(
    ("name", "lane"),
    [
        (BASE, LaneKey(BASE, 8, 8, guided=True)),
        (BASE, LaneKey(BASE, 8, 8, guided=False, rank=8)),
        (UPSCALER, LaneKey(UPSCALER, 8, 8, guided=True, rank=16)),
        ("text2im", LaneKey("text2im", 8, 8, guided=True, blends=True)),
        ("celeba", LaneKey("celeba", 8, 8, guided=False, blends=True)),
    ],
)
def test_a_slot_that_is_cleared_holds_zeros(models: Mapping[str, LatentDiffusion], name: str, lane: LaneKey) -> None:
    bank = Bank(ResidentModel(tune(models[name] if name in models else family(name), Tuning())), lane, SLOTS)
    if bank.adapters is not None:
        bank.adapters.cover_all()
    tensors = list(tensors_of(vars(bank)))
    assert len(tensors) > 12
    for tensor in tensors:
        tensor.fill_(True if tensor.dtype is torch.bool else torch.nan if tensor.is_floating_point() else 7)
    bank.clear(1)
    second = {id(tensor) for tensor in bank.per_condition}
    for tensor in tensors:
        slots = tensor.movedim(1 if id(tensor) in second else 0, 0)
        assert len(slots) == SLOTS
        assert [bool(slot.any()) for slot in slots] == [True, False, True]  # NaN counts as any other number
