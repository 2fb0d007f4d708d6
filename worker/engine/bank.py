"""The tensors of one lane, allocated once. A row owns one slot of each, so nothing is gathered or moved per tick."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from models.attention import KeyValue
from models.samplers import COLUMNS
from models.tasks import Blend, Start
from worker.engine.adapters import AdapterBank
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey


class Bank:
    """P slots; k = 2 in guided lanes ([unconditional | conditional]), else 1.

    x, noise and clean (the predicted x_0) [P, z, h, w] fp32, conditioning [P, c, h, w] fp32 or None, kv per text
    attention [k, P, heads, L, d], coefficients [P, T, 6], timesteps [P, T], step and active [P], guidance [P],
    addition to the time embedding [k, P, E], [1, P, E] where all k have the same, or None. Rows whose time embeddings
    are not in the model's table have `own_time` [P] set and that of their next step in `time` [P, E]. Lanes that blend
    have the rows' blends, levels [P, T, 2], lanes with a rank the rows' adapters. A free slot holds zeros: it is
    computed along and stays finite.
    """

    def __init__(self, resident: ResidentModel, key: LaneKey, slots: int) -> None:
        device = resident.model.device
        steps = resident.time_table.shape[0]
        size = (resident.model.autoencoder.config.latent_channels, key.height, key.width)
        self.x = torch.zeros(slots, *size, device=device)
        self.noise = torch.zeros_like(self.x)
        self.clean = torch.zeros_like(self.x)
        channels = resident.conditioning_channels
        self.conditioning = torch.zeros(slots, channels, *size[1:], device=device) if channels else None
        k = 2 if key.guided else 1
        self.kv = [(_per_slot(keys, slots), _per_slot(values, slots)) for keys, values in resident.blank(k).kv]
        self.blend: Blend | None = None
        if key.blends:
            mask, levels = self.x.new_zeros(slots, 1, *size[1:]), self.x.new_zeros(slots, steps, 2)
            self.blend = Blend(torch.zeros_like(self.x), torch.zeros_like(self.x), mask, levels)
        self.adapters = AdapterBank(resident.model.unet, slots, key.rank, resident.time_table) if key.rank else None
        self.coefficients = torch.zeros(slots, steps, COLUMNS, device=device)
        self.timesteps = torch.zeros(slots, steps, dtype=torch.long, device=device)
        self.step = torch.zeros(slots, dtype=torch.long, device=device)
        self.active = torch.zeros_like(self.step)
        self.guidance = torch.zeros(slots, device=device)
        self.time = resident.time_table.new_zeros(slots, resident.time_table.shape[1])
        self.own_time = torch.zeros(slots, dtype=torch.bool, device=device)
        self.addition: Tensor | None = None
        unet = resident.model.unet
        if unet.class_embedding is not None or unet.add_embedding is not None:
            self.addition = self.time.new_zeros(1 if unet.add_embedding is None else k, *self.time.shape)

    def write(
        self, slot: int, start: Start, kv: list[KeyValue], guidance_scale: float, addition: Tensor | None
    ) -> None:
        """A row moves in, ready for its first step but for its adapters."""
        timesteps = torch.tensor(start.plan.timesteps)
        steps = len(timesteps)
        self.set_progress(slot, start.latents[0], 0)
        if self.conditioning is not None and start.conditioning is not None:
            self.conditioning[slot] = start.conditioning[0]
        for (k_bank, v_bank), (k, v) in zip(self.kv, kv, strict=True):
            k_bank[:, slot] = k
            v_bank[:, slot] = v
        self.coefficients[slot, :steps] = start.plan.coefficients
        self.timesteps[slot, :steps] = timesteps.long()
        self.active[slot] = 1
        self.guidance[slot] = guidance_scale
        if self.addition is not None and addition is not None:
            self.addition[:, slot] = addition
        if self.blend is not None and start.blend is not None:
            for bank, row in zip(self.blend[:3], start.blend[:3], strict=True):
                bank[slot] = row[0]
            self.blend.levels[slot, :steps] = start.blend.levels

    def set_progress(self, slot: int, x: Tensor, step: int, clean: Tensor | None = None) -> None:
        """The row goes on with latents x [z, h, w] after `step` steps, the last of which predicted x_0 `clean`."""
        self.x[slot] = x
        self.step[slot] = step
        if clean is not None:
            self.clean[slot] = clean

    def clear(self, slot: int) -> None:
        """A row moves out; what it may have left behind, NaN for one, goes with it."""
        for tensor in (self.x, self.noise, self.clean, self.conditioning, *(self.blend or ())):
            if tensor is not None:
                tensor[slot] = 0
        for tensor in (self.coefficients, self.timesteps, self.step, self.active, self.guidance, self.time):
            tensor[slot] = 0
        self.own_time[slot] = False
        if self.adapters is not None:
            self.adapters.clear(slot)
        for tensor in self.per_condition:
            tensor[:, slot] = 0

    @property
    def per_condition(self) -> list[Tensor]:
        """Those whose slots come second, [k, P, ...]."""
        return [*itertools.chain(*self.kv), *([] if self.addition is None else [self.addition])]

    def rows_kv(self, rows: slice) -> list[KeyValue]:
        """Keys and values [k * rows, heads, L, d] as `UNet.denoise` takes them; views when `rows` is the whole bank."""
        return [(k[:, rows].flatten(0, 1), v[:, rows].flatten(0, 1)) for k, v in self.kv]


def _per_slot(tensor: Tensor, slots: int) -> Tensor:
    """[k, ...] -> zeros [k, slots, ...]."""
    return tensor.new_zeros(tensor.shape[0], slots, *tensor.shape[1:])
