"""One tick of one lane: a UNet forward over a range of slots, guidance and a sampler step, with per-row settings.

Runs on the device without a host sync; whoever calls it decides which slots and when.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from models.samplers import advance, guide, put_back
from models.tasks import PictureRequest, Start, prepare
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel
from worker.engine.resume import ResumeState


def admit(resident: ResidentModel, bank: Bank, slot: int, request: PictureRequest) -> tuple[Start, Tensor | None]:
    """Encodes text and pictures at batch 1 and writes the row into its slot; with what `feed` takes as `time`.

    Raises ValueError as `prepare` does.
    """
    start, uses = prepare(resident.model, request, resident.blank_posterior), resident.model.uses(request)
    kv, pooled = resident.project(resident.model.conditions(request), uses)
    bank.write(slot, start, kv, request.guidance_scale, resident.addition(start, pooled, uses))
    if bank.adapters is not None and bank.adapters.write(slot, uses):
        resident.graphs.forget(bank)
    time = resident.own_time(start.plan, uses)
    bank.own_time[slot] = time is not None
    return start, time


def go_on(bank: Bank, slot: int, start: Start, state: ResumeState) -> bool:
    """The admitted row takes up where `state` is, the noise until there drawn and left; False if it does not fit."""
    left = len(start.plan.timesteps) - state.step
    lacks_history = start.plan.has_history and state.step > 0 and left > 0 and state.clean is None
    if left < 0 or state.x.shape != bank.x.shape[1:] or lacks_history:
        return False
    for _ in range(state.step):
        start.step_noise()
    bank.set_progress(slot, state.x, state.step, state.clean)
    return True


def feed(bank: Bank, slot: int, start: Start, time: Tensor | None, step: int) -> None:
    """What the row's step number `step` takes from the host; `time` [steps, E] are its own time embeddings."""
    if start.plan.stochastic:
        bank.noise[slot] = start.step_noise()[0]
    if time is not None:
        bank.time[slot] = time[step]


def step(resident: ResidentModel, bank: Bank, rows: slice) -> None:
    """All rows in the slots `rows` advance by one step; on an exception none has changed."""
    if bank.x.is_cuda:
        resident.graphs.run(lambda: _step(resident, bank, rows), bank, rows)
    else:
        _step(resident, bank, rows)


def _step(resident: ResidentModel, bank: Bank, rows: slice) -> None:
    index = bank.step[rows]
    slots = torch.arange(rows.start, rows.stop, device=index.device)
    t = bank.timesteps[slots, index]
    emb = torch.where(bank.own_time[rows, None], bank.time[rows], resident.time_table[t])
    if bank.addition is not None:
        emb = (emb + bank.addition[:, rows]).flatten(0, 1)
    x = bank.x[rows]
    inputs = x if bank.conditioning is None else torch.cat([x, bank.conditioning[rows]], dim=1)
    with nullcontext() if bank.adapters is None else bank.adapters.attached(rows):
        out = resident.model.unet.denoise(inputs.to(emb.dtype), emb, bank.rows_kv(rows)).float()
    if out.shape[0] > x.shape[0]:
        out = guide(out, bank.guidance[rows])
    stepped, clean = advance(x, out, bank.clean[rows], bank.noise[rows], bank.coefficients[slots, index])
    if bank.blend is not None:
        kept, noise, mask, levels = bank.blend
        stepped = put_back(stepped, kept[rows], noise[rows], mask[rows], levels[slots, index])
    bank.x[rows], bank.clean[rows] = stepped, clean
    bank.step[rows] += bank.active[rows]
