"""The assembled model: autoencoder, UNet, conditioner and schedule, as one thing to load, save and draw with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from models.attention import KeyValue
from models.autoencoder import Autoencoder, Posterior
from models.class_label import ClassEncoder
from models.conditioning import Condition, Conditioner, Encoded
from models.config import UnsupportedStructure
from models.layout import LayoutEncoder
from models.lora import Adapter, Uses, adapted
from models.lora_files import load_adapters
from models.samplers import advance, guide, put_back
from models.schedule import NoiseSchedule
from models.tasks import PictureRequest, Task, finish, prepare
from models.text import TextConditioner
from models.tiling import TiledDecoding
from models.unet import UNet
from models.weights_io.files import Reading
from models.weights_io.load import load_parts
from models.weights_io.single_file import Told

OnStep = Callable[[int, int], None]
Conditioning = Literal["text", "class", "layout", "semantic", "none"]
"""What a request must say of the picture."""


class Projected(NamedTuple):
    """Of one picture's k conditions: keys and values for `UNet.denoise`, each [k, heads, L, d], [] without a context;
    pooled [k, D'] for `LatentDiffusion.addition`, None without one."""

    kv: list[KeyValue]
    pooled: Tensor | None


class LatentDiffusion(nn.Module):
    """What the UNet sees tells the model's kind. Beside the latents:

    a small picture: an upscaler, noised by a `low_res_schedule` (SD x4) or as it is (LDM's super resolution);
    a semantic map, rescaled and then mapped by the 1x1 convolution `semantic` [classes -> channels];
    a mask and a masked picture: an inpainting model; or nothing.
    A `conditioner` makes what it attends to, None for a UNet without a context. `adapters` by name are there for
    requests to use.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        conditioner: Conditioner | None,
        schedule: NoiseSchedule,
        low_res_schedule: NoiseSchedule | None = None,
        semantic: nn.Conv2d | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.autoencoder = autoencoder
        self.conditioner = conditioner
        self.schedule = schedule
        self.low_res_schedule = low_res_schedule
        self.semantic = semantic
        self.adapters: dict[str, Adapter] = {}
        self._check()

    def _check(self) -> None:
        """Raises UnsupportedStructure when the parts do not fit one another."""
        unet, z = self.unet.config, self.autoencoder.config.latent_channels
        expected: dict[str, tuple[int | None, ...]] = {
            "in_channels": tuple(z + beside for beside in self._seen_beside()),
            "out_channels": (z,),
            "cross_attention_dim": (None if self.conditioner is None else self.conditioner.width,),
            "pooled_width": (0 if self.conditioner is None else self.conditioner.pooled_width,),
        }
        for name, values in expected.items():
            if getattr(unet, name) not in values:
                allowed = " or ".join(map(str, values))
                raise UnsupportedStructure(f"UNet {name}={getattr(unet, name)}; expected {allowed} beside these parts")
        if (unet.num_class_embeds is not None) != (self.low_res_schedule is not None):
            raise UnsupportedStructure("an upscaler, and no other model, has num_class_embeds and a low_res_scheduler")
        if self.semantic is not None and (self.conditioner is not None or self.low_res_schedule is not None):
            raise UnsupportedStructure("a semantic map is all that its model takes; expected no other condition")

    def _seen_beside(self) -> tuple[int, ...]:
        """How many channels the UNet can have beside the latents, given the other parts."""
        mask, low_res = self.autoencoder.config.latent_channels + 1, self.autoencoder.config.in_channels
        if self.low_res_schedule is not None:
            return (low_res,)
        if self.semantic is not None:
            return (self.semantic.out_channels,)
        if self.conditioner is None:
            return (0, low_res, mask)
        return (0, mask) if isinstance(self.conditioner, TextConditioner) else (0,)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype | None = None, told: Told = Told()) -> LatentDiffusion:  # noqa: B008
        """A diffusers folder or single file on the CPU, in eval mode and frozen, in fp32 unless `dtype` says otherwise.

        Its adapters come along. Raises as `load_parts` and `load_adapters` do.
        """
        model = cls(*load_parts(Path(path), Reading(dtype or torch.float32), told)).eval().requires_grad_(False)
        model.adapters = load_adapters(Path(path), model)
        return model

    @property
    def _beside(self) -> int:
        return self.unet.config.in_channels - self.autoencoder.config.latent_channels

    @property
    def upscales(self) -> bool:
        """Whether the UNet takes [latents, small picture]; then pictures grow by the autoencoder's factor f."""
        if self.low_res_schedule is not None:
            return True
        without = self.conditioner is None and self.semantic is None
        return without and self._beside == self.autoencoder.config.in_channels

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes latents, a mask and masked latents."""
        return self._beside > 0 and not self.upscales and self.semantic is None

    def blends(self, request: PictureRequest) -> bool:
        """Whether the picture is inpainted by a UNet that was not made for it: what is kept is put back every step."""
        return request.task == "inpaint" and not self.inpaints

    def uses(self, request: PictureRequest) -> Uses:
        """The picture's adapters with their weights. Raises ValueError for one that the model does not have."""
        unknown = [name for name, _ in request.loras if name not in self.adapters]
        if unknown:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"no adapter of this model: {', '.join(unknown)}; it has: {known}")
        return [(self.adapters[name], weight) for name, weight in request.loras if weight]

    @property
    def conditioning(self) -> Conditioning:
        if self.semantic is not None:
            return "semantic"
        match self.conditioner:
            case None:
                return "none"
            case ClassEncoder():
                return "class"
            case LayoutEncoder():
                return "layout"
            case _:
                return "text"

    def conditions(self, request: PictureRequest) -> list[Condition]:
        """What the picture's rows of the UNet attend to: [] without a context, else [conditional] or, with guidance,
        [unconditional, conditional].

        Guidance needs a model that knows an unconditional condition, and its second row only above scale 1 (as in
        diffusers' SD pipelines). Raises ValueError for a request without the label that a class-conditional model
        needs, or with a layout that cannot be told.
        """
        if self.conditioner is None:
            return []
        unconditional, conditional = self.conditioner.blank, self._condition(request)
        if isinstance(self.conditioner, TextConditioner):
            unconditional = request.negative_prompt or unconditional
        guided = request.guidance_scale > 1.0 and self.conditioner.learns_unconditional
        return [unconditional, conditional] if guided else [conditional]

    def _condition(self, request: PictureRequest) -> Condition:
        match self.conditioner:
            case ClassEncoder(config=config):
                if request.class_label is None or not 0 <= request.class_label < config.num_classes:
                    raise ValueError(f"class_label={request.class_label}: expected 0 to {config.num_classes - 1}")
                return request.class_label
            case LayoutEncoder() as encoder:
                return encoder.tokens(request.layout)
            case _:
                return request.prompt

    def project(self, conditions: Sequence[Condition]) -> Projected:
        """What the UNet takes of one picture's k conditions."""
        if self.conditioner is None:
            return Projected([], None)
        context, pooled = Encoded.join([self.conditioner.encode_with_pooled(condition) for condition in conditions])
        return Projected(self.unet.project_context(context.to(self.device, self.unet.conv_in.weight.dtype)), pooled)

    def addition(self, pooled: Tensor | None, latents: Tensor) -> Tensor | None:
        """What `UNet.embed` takes of pooled conditions [k, D'] and of the size of a picture with these latents: [k, E].

        None for a UNet that embeds neither. The picture is taken for a whole one: nothing was cropped.
        """
        if pooled is None:
            return None
        height, width = (side * self.autoencoder.config.downsampling_factor for side in latents.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(pooled), device=self.device)
        return self.unet.embed_addition(pooled.to(self.device), sizes)

    @property
    def max_noise_level(self) -> int:
        """The largest timestep to which an upscaler noises its input; 0 for other models.

        350 as in diffusers, where its table of class embeddings goes that far.
        """
        return min(self.unet.config.num_class_embeds or 1, 351) - 1

    @property
    def tasks(self) -> frozenset[Task]:
        if self.upscales:
            return frozenset({"upscale"})
        if self.semantic is not None:
            return frozenset({"txt2img"})
        if self.inpaints and self.conditioner is None:
            return frozenset({"inpaint"})
        return frozenset({"txt2img", "img2img", "inpaint"})

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """Pixels [1, 3, H, W] in [-1, 1] -> q(z|x) in fp32 on the CPU, where the generators are."""
        weight = self.autoencoder.encoder.conv_in.weight
        posterior = self.autoencoder.encode(pixels.to(weight.device, weight.dtype))
        return posterior._replace(mean=posterior.mean.float().cpu(), logvar=posterior.logvar.float().cpu())

    def blank_posterior(self, height: int, width: int) -> Posterior:
        """`posterior` of a grey picture of `height` x `width` pixels: what an inpainting model sees of no picture."""
        return self.posterior(torch.zeros(1, self.autoencoder.config.in_channels, height, width))

    def scaled_sample(self, posterior: Posterior, generator: torch.Generator) -> Tensor:
        """Scaled latents [1, z, h, w], drawn from the posterior; a deterministic one draws nothing."""
        if posterior.deterministic:
            return posterior.mean * self.autoencoder.config.scaling_factor
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32)
        return posterior.sample(noise) * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [1, z, h, w] -> pixels [1, 3, H, W] in fp32, about [-1, 1]."""
        weight = self.autoencoder.encoder.conv_in.weight
        unscaled = latents / self.autoencoder.config.scaling_factor
        return self.autoencoder.decode(unscaled.to(weight.device)).float()

    def decoding(self, latents: Tensor) -> TiledDecoding:
        """`decode_latents` in pieces that bound memory and time, [1, 3, H, W] as well; one piece for usual sizes."""
        return TiledDecoding(self.decode_latents, latents, self.autoencoder.config.downsampling_factor)

    def render(self, request: PictureRequest, on_step: OnStep | None = None) -> Image.Image:
        """One picture, alone: the plain statement of the algorithm, against which the engine is tested."""
        decoding = self.decoding(self.render_latents(request, on_step))
        while not decoding.done:
            decoding.step()
        return finish(request, decoding.pixels)

    @torch.no_grad()
    def render_latents(self, request: PictureRequest, on_step: OnStep | None = None) -> Tensor:
        """The picture's denoised (scaled) latents [1, z, h, w].

        `on_step(done, steps)` is called after each step. Raises ValueError as `tasks.prepare` and `uses` do.
        """
        with adapted(self, self.uses(request)):
            return self._render_latents(request, on_step)

    def _render_latents(self, request: PictureRequest, on_step: OnStep | None) -> Tensor:
        start = prepare(self, request)
        device, dtype = self.device, self.unet.conv_in.weight.dtype
        kv, pooled = self.project(self.conditions(request))
        addition = self.addition(pooled, start.latents)
        labels = None if start.label is None else torch.tensor([start.label], device=device)
        scale = torch.tensor([request.guidance_scale], device=device)
        conditioning = None if start.conditioning is None else start.conditioning.to(device)
        blend = None if start.blend is None else [tensor.to(device) for tensor in start.blend]
        x = start.latents.to(device)
        previous = torch.zeros_like(x)
        for index, t in enumerate(start.plan.timesteps):
            inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
            emb = self.unet.embed(torch.tensor([t], device=device), labels, addition)
            out = self.unet.denoise(inputs.to(dtype), emb, kv).float()
            if out.shape[0] == 2:
                out = guide(out, scale)
            noise = start.step_noise().to(device)
            x, previous = advance(x, out, previous, noise, start.plan.coefficients[index : index + 1].to(device))
            if blend is not None:
                clean, kept_noise, mask, levels = blend
                x = put_back(x, clean, kept_noise, mask, levels[index : index + 1])
            if on_step is not None:
                on_step(index + 1, len(start.plan.timesteps))
        return x
