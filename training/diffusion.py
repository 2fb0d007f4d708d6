"""Second stage (Rombach et al. 2022, eq. 3): the text-conditioned UNet and its text encoder, together, on latents.

One inpainting UNet ([latents, mask, masked latents]) learns all three tasks: text to image is inpainting where all is
masked, image to image starts it half-way.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from models.attention import Attention, SpatialTransformer, plain_attention, set_attention
from models.config import ScheduleConfig, UNetConfig
from models.layers import ResnetBlock
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet
from training.latents import LatentDataset
from training.loop import LoopSettings, train
from training.losses import draw_timesteps, min_snr_weight, target

SCHEDULE = ScheduleConfig(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    set_alpha_to_one=True,
)

SMALL_UNET = UNetConfig(
    sample_size=16,
    in_channels=9,
    out_channels=4,
    block_out_channels=(64, 128, 192),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4, 6),
    cross_attention_dim=192,
    use_linear_projection=True,
    norm_num_groups=8,
)


@dataclasses.dataclass(frozen=True)
class DiffusionSettings:
    """Shares of a batch: pictures with a hole (the rest is repainted whole), captions replaced by the empty one."""

    batch: int = 64
    inpaint_share: float = 0.18
    caption_dropout: float = 0.1


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def initialise(unet: UNet, text_encoder: TextEncoder) -> None:
    """Residual branches and the output start at zero (Dhariwal & Nichol 2021); embeddings loud (std 1, positions 0.3).

    With the usual std of 0.02 the model followed backgrounds and never learned objects.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, Attention):
            for projection in (module.to_q, module.to_k, module.to_v):
                nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(unet.conv_out.weight)
    set_attention(unet, plain_attention)
    embeddings = text_encoder.transformer.get_submodule("embeddings")
    for name, std in (("token_embedding", 1.0), ("position_embedding", 0.3)):
        embedding = embeddings.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        nn.init.normal_(embedding.weight, std=std)


class Denoiser(nn.Module):
    """What the second stage trains; the autoencoder is frozen and not part of it."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x: Tensor, t: Tensor, token_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.unet(x, t, self.text_encoder(token_ids), labels)
        return out


class TextTable:
    """Token ids of every caption, and of the empty one that stands in for a dropped caption."""

    def __init__(self, text_encoder: TextEncoder, captions: list[str]) -> None:
        self.ids = text_encoder.token_ids(captions)
        self.empty = text_encoder.token_ids([""])

    def draw(self, rows: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(len(rows), generator=generator) < dropout
        return torch.where(dropped[:, None], self.empty, self.ids[rows])


def denoising_loss(
    denoiser: nn.Module,
    schedule: NoiseSchedule,
    x0: Tensor,
    conditioning: Tensor,
    token_ids: Tensor,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted squared error of the prediction at random timesteps; `conditioning` is concatenated after noisy x0."""
    t = draw_timesteps(len(x0), schedule.config.num_train_timesteps, generator)
    noise = torch.randn(x0.shape, generator=generator)
    inputs = torch.cat([schedule.add_noise(x0, noise, t), conditioning], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = denoiser(inputs, t, token_ids, labels)
    error = F.mse_loss(out.float(), target(schedule, x0, noise, t), reduction="none").mean(dim=(1, 2, 3))
    return {"loss": (error * min_snr_weight(schedule, t)).mean(), "mse": error.mean()}


def _draw(
    data: LatentDataset, settings: DiffusionSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, x0, [mask, masked latents]): the first share of the batch has holes, the rest is masked everywhere."""
    holes = int(settings.batch * settings.inpaint_share) if len(data.masks) else 0
    with_hole = torch.randint(max(len(data.masks), 1), (holes,), generator=generator)
    whole = torch.randint(len(data.latents), (settings.batch - holes,), generator=generator)
    rows = torch.cat([with_hole, whole])
    hole = torch.cat([data.masks[with_hole], data.masked[with_hole]], dim=1).float()
    return rows, data.latents[rows].float(), torch.cat([hole, data.all_masked.expand(len(whole), -1, -1, -1)])


def new_denoiser(tokenizer_folder: Path, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    unet = UNet(SMALL_UNET)
    text_encoder = TextEncoder.create(tokenizer, text_config(tokenizer, SMALL_UNET.context_width, 2, 3))
    initialise(unet, text_encoder)
    return Denoiser(unet, text_encoder)


def train_diffusion(
    data: LatentDataset,
    tokenizer_folder: Path,
    folder: Path,
    loop: LoopSettings,
    settings: DiffusionSettings = DiffusionSettings(),
) -> Denoiser:
    """Train (or resume) in `folder`; the averaged weights come back."""
    schedule = NoiseSchedule(SCHEDULE)
    denoiser = new_denoiser(tokenizer_folder, loop.seed)
    texts = TextTable(denoiser.text_encoder, data.captions)

    def loss_fn(module: nn.Module, _step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows, x0, conditioning = _draw(data, settings, generator)
        token_ids = texts.draw(rows, settings.caption_dropout, generator)
        return denoising_loss(module, schedule, x0, conditioning, token_ids, generator)

    trained = train(denoiser, loss_fn, loop, folder, "diffusion")
    assert isinstance(trained, Denoiser)
    return trained
