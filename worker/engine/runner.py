"""One tick of one lane: a UNet forward over a range of slots, guidance and the DDIM step, with per-row settings.

Runs on the device without a host sync; whoever calls it decides which slots and when.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.samplers import ddim_step, guide
from models.tasks import PictureRequest, Start, prepare
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel


def admit(resident: ResidentModel, bank: Bank, slot: int, request: PictureRequest) -> Start:
    """Encodes text and pictures at batch 1 and writes the row into its slot. Raises ValueError as `prepare` does."""
    start = prepare(resident.model, request, resident.blank_posterior)
    prompts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
    label = resident.class_embedding(start.label)
    bank.write(slot, start, resident.project(prompts), request.guidance_scale, label)
    return start


def go_on(bank: Bank, slot: int, request: PictureRequest, start: Start, x: Tensor, step: int) -> None:
    """The admitted row takes up latents x [z, h, w] after `step` steps, whose noise is drawn and left."""
    for _ in range(step):
        start.step_noise(request.eta)
    bank.set_progress(slot, x, step)


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
    emb = resident.time_table[t]
    if bank.class_embedding is not None:
        emb = emb + bank.class_embedding[rows]
    x = bank.x[rows]
    inputs = x if bank.conditioning is None else torch.cat([x, bank.conditioning[rows]], dim=1)
    out = resident.model.unet.denoise(inputs.to(emb.dtype), emb, bank.rows_kv(rows)).float()
    if out.shape[0] > x.shape[0]:
        out = guide(out, bank.guidance[rows])
    c, d = resident.clean_table[t][:, :, None, None, None].unbind(1)
    clean = c * x + d * out
    stepped = ddim_step(x, out, bank.noise[rows], bank.coefficients[slots, index])
    bank.clean[rows] = clean
    bank.x[rows] = stepped
    bank.step[rows] += bank.active[rows]
