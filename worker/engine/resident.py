"""A loaded model with all that is computed once and then read at every step."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from models.autoencoder import Posterior
from models.conditioning import Condition, Encoded
from models.latent_diffusion import LatentDiffusion, Projected
from models.lora import Uses, adapted_text
from models.samplers import SamplingPlan
from models.tasks import Start
from worker.engine.adapters import adapted_context, adapted_time, changes_time
from worker.engine.cuda_graphs import GraphedSteps
from worker.engine.preview import LatentPreview

_CONTEXTS_KEPT = 128
_BLANKS_KEPT = 16


class ResidentModel:
    """`time_table` [T, E]: embeddings of all timesteps."""

    @torch.inference_mode()
    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        timesteps = torch.arange(model.schedule.config.num_train_timesteps, device=model.device)
        self.time_table = model.unet.embed_time(timesteps)
        self.preview = LatentPreview.fit(model)
        weights = itertools.chain(model.unet.parameters(), model.unet.buffers())  # buffers hold those that are packed
        self.parameters = sum(weight.numel() for weight in weights)
        self.graphs = GraphedSteps()
        self._contexts: OrderedDict[tuple[Condition, tuple[tuple[str, float], ...]], Encoded] = OrderedDict()
        self._blanks: OrderedDict[tuple[int, int], Posterior] = OrderedDict()

    @property
    def conditioning_channels(self) -> int:
        """Channels of the UNet's input beside the latents."""
        return self.model.unet.config.in_channels - self.model.autoencoder.config.latent_channels

    def blank_posterior(self, height: int, width: int) -> Posterior:
        """As the model's; those of the last sizes are kept, since every txt2img of an inpainting model needs one."""
        size = (height, width)
        if size not in self._blanks:
            self._blanks[size] = self.model.blank_posterior(height, width)
            if len(self._blanks) > _BLANKS_KEPT:
                self._blanks.popitem(last=False)
        self._blanks.move_to_end(size)
        return self._blanks[size]

    def encoded(self, condition: Condition, uses: Uses = ()) -> Encoded:
        """Its encoding, of one row; those of the last conditions are kept, the empty prompt among them most often."""
        key = condition, tuple((adapter.digest, weight) for adapter, weight in uses if adapter.text)
        if key not in self._contexts:
            assert self.model.conditioner is not None
            with adapted_text(self.model, uses):
                self._contexts[key] = self.model.conditioner.encode_with_pooled(condition)
            if len(self._contexts) > _CONTEXTS_KEPT:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def project(self, conditions: Sequence[Condition], uses: Uses = ()) -> Projected:
        """As the model's."""
        if not conditions:
            return Projected([], None)
        context, pooled = Encoded.join([self.encoded(condition, uses) for condition in conditions])
        context = context.to(self.model.device, self.time_table.dtype)
        with adapted_context(self.model.unet, uses, context):
            return Projected(self.model.unet.project_context(context), pooled)

    def blank(self, rows: int) -> Projected:
        """`project` of as many conditions that say nothing."""
        conditioner = self.model.conditioner
        return self.project([] if conditioner is None else [conditioner.blank] * rows)

    def own_time(self, plan: SamplingPlan, uses: Uses = ()) -> Tensor | None:
        """Embeddings [steps, E] of a plan's timesteps where the table lacks them, or lacks what these adapters do."""
        if not plan.fractional and not changes_time(self.model.unet, uses):
            return None
        timesteps = torch.tensor(plan.timesteps, device=self.model.device)
        with adapted_time(self.model.unet, uses):
            return torch.cat([self.model.unet.embed_time(t[None]) for t in timesteps])

    def class_embedding(self, label: int | None) -> Tensor | None:
        """[E], to be added to the time embedding at every step; None for a structure without class labels."""
        embedding = self.model.unet.class_embedding
        if embedding is None:
            return None
        if label is None or not 0 <= label < embedding.num_embeddings:
            raise ValueError(f"class label {label}: expected 0 to {embedding.num_embeddings - 1}")
        return embedding.weight[label]

    def addition(self, start: Start, pooled: Tensor | None, uses: Uses = ()) -> Tensor | None:
        """[k, E], to be added to the time embedding at every step: of a class label, whose k is 1, of pooled conditions
        and sizes, or of both; None for a structure without either."""
        label = self.class_embedding(start.label)
        with adapted_time(self.model.unet, uses):
            addition = self.model.addition(pooled, start.latents)
        if label is None or addition is None:
            return addition if label is None else label[None]
        return label + addition
