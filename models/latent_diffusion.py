"""The assembled model: autoencoder, UNet, text encoder and schedule, as one thing to load, save and draw with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Posterior
from models.config import UnsupportedStructure
from models.samplers import advance, guide
from models.schedule import NoiseSchedule
from models.tasks import PictureRequest, Task, finish, prepare
from models.text import TextEncoder
from models.tiling import TiledDecoding
from models.unet import UNet
from models.weights_io.files import Reading
from models.weights_io.folder import load_parts

OnStep = Callable[[int, int], None]


class LatentDiffusion(nn.Module):
    """`low_res_schedule` noises the input of an upscaler and marks the model as one."""

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        conditioner: TextEncoder,
        schedule: NoiseSchedule,
        low_res_schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.autoencoder = autoencoder
        self.conditioner = conditioner
        self.schedule = schedule
        self.low_res_schedule = low_res_schedule
        self._check()

    def _check(self) -> None:
        """Raises UnsupportedStructure when the parts do not fit one another."""
        unet, z = self.unet.config, self.autoencoder.config.latent_channels
        upscales = self.low_res_schedule is not None
        expected: dict[str, tuple[int, ...]] = {
            "in_channels": (z + self.autoencoder.config.in_channels,) if upscales else (z, 2 * z + 1),
            "out_channels": (z,),
            "cross_attention_dim": (self.conditioner.width,),
        }
        for name, values in expected.items():
            if getattr(unet, name) not in values:
                allowed = " or ".join(map(str, values))
                raise UnsupportedStructure(f"UNet {name}={getattr(unet, name)}; expected {allowed} beside these parts")
        if (unet.num_class_embeds is not None) != upscales:
            raise UnsupportedStructure("an upscaler, and no other model, has num_class_embeds and a low_res_scheduler")

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype | None = None) -> LatentDiffusion:
        """A diffusers folder on the CPU, in eval mode and frozen, in fp32 unless `dtype` says otherwise.

        Raises as `load_parts` does.
        """
        return cls(*load_parts(Path(path), Reading(dtype or torch.float32))).eval().requires_grad_(False)

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes [latents, mask, masked latents]."""
        return self.low_res_schedule is None and (
            self.unet.config.in_channels == 2 * self.autoencoder.config.latent_channels + 1
        )

    @property
    def max_noise_level(self) -> int:
        """The largest timestep to which an upscaler noises its input; 0 for other models.

        350 as in diffusers, where its table of class embeddings goes that far.
        """
        return min(self.unet.config.num_class_embeds or 1, 351) - 1

    @property
    def tasks(self) -> frozenset[Task]:
        if self.low_res_schedule is not None:
            return frozenset({"upscale"})
        return frozenset({"txt2img", "img2img", "inpaint"} if self.inpaints else {"txt2img", "img2img"})

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

        `on_step(done, steps)` is called after each step. Raises ValueError as `tasks.prepare` does.
        """
        start = prepare(self, request)
        device, dtype = self.device, self.unet.conv_in.weight.dtype
        prompts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
        context = torch.cat([self.conditioner.encode(prompt) for prompt in prompts])
        kv = self.unet.project_context(context.to(device, dtype))
        labels = None if start.label is None else torch.tensor([start.label], device=device)
        scale = torch.tensor([request.guidance_scale], device=device)
        conditioning = None if start.conditioning is None else start.conditioning.to(device)
        x = start.latents.to(device)
        clean = torch.zeros_like(x)
        for index, t in enumerate(start.plan.timesteps):
            inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
            emb = self.unet.embed(torch.tensor([t], device=device), labels)
            out = self.unet.denoise(inputs.to(dtype), emb, kv).float()
            if request.guided:
                out = guide(out, scale)
            noise = start.step_noise().to(device)
            x, clean = advance(x, out, clean, noise, start.plan.coefficients[index : index + 1].to(device))
            if on_step is not None:
                on_step(index + 1, len(start.plan.timesteps))
        return x
