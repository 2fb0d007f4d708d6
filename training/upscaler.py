"""The x4 upscaler: denoises latents of the large picture (f = 4) beside the small picture, which has their size.

Structure and conditioning of the published x4-upscaler: [latents 4, small picture 3], the small picture noised to a
random level that the UNet is told as a class label.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPTokenizer

from models.autoencoder import Autoencoder
from models.config import ScheduleConfig, UNetConfig
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet
from training.autoencoder import to_tensor
from training.data import generate
from training.diffusion import SCHEDULE, Denoiser, TextTable, denoising_loss, initialise, text_config
from training.latents import encode
from training.loop import LoopSettings, train

FACTOR = 4
MAX_NOISE_LEVEL = 350

LOW_RES_SCHEDULE = ScheduleConfig(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
"""How the small picture is noised; the published x4-upscaler's."""

SMALL_X4_UNET = UNetConfig(
    sample_size=32,
    in_channels=7,
    out_channels=4,
    block_out_channels=(40, 80, 104),
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(1, 2, 4),
    cross_attention_dim=64,
    use_linear_projection=True,
    norm_num_groups=4,
    num_class_embeds=MAX_NOISE_LEVEL + 1,
)


@dataclasses.dataclass(frozen=True)
class UpscalerSettings:
    """Most captions are dropped: a caller rarely says what the picture shows. `clean_share` sees next to no noise."""

    batch: int = 16
    caption_dropout: float = 0.7
    clean_share: float = 0.6


def shrink(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """4x bicubic downsampling of [H, W, 3]."""
    height, width = picture.shape[:2]
    image = Image.fromarray(picture, "RGB").resize((width // FACTOR, height // FACTOR), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _examples(n: int, seed: int, start: int, side: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Pictures [n, side, side, 3]; every fourth is a part cut from one of twice the side, where objects are larger."""
    pictures, captions, _ = generate(n, seed, side, start)
    large, _, _ = generate(len(range(0, n, 4)), seed, 2 * side, start)
    rng = np.random.default_rng((seed, start))
    for row, picture in zip(range(0, n, 4), large, strict=True):
        y, x = rng.integers(0, side + 1, 2)
        pictures[row] = picture[y : y + side, x : x + side]
        captions[row] = ""
    return pictures, captions


def write_upscaler_latents(autoencoder: Autoencoder, out: Path, n: int, seed: int, side: int = 128) -> None:
    """Latents of `n` pictures, the pictures 4x smaller (uint8 [n, h, w, 3]) and captions, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    latents, small, texts = [], [], []
    batch = 64
    for start in track(range(0, n, batch), description="upscaler latents"):
        pictures, captions = _examples(min(batch, n - start), seed, start, side)
        latents.append(encode(autoencoder, to_tensor(pictures)).numpy())
        small.append(np.stack([shrink(picture) for picture in pictures]))
        texts += captions
    np.save(out / "latents.npy", np.concatenate(latents))
    np.save(out / "small.npy", np.concatenate(small))
    (out / "captions.json").write_text(json.dumps(texts), encoding="utf-8")


def new_upscaler(tokenizer_folder: Path, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    unet = UNet(SMALL_X4_UNET)
    text_encoder = TextEncoder.create(tokenizer, text_config(tokenizer, SMALL_X4_UNET.context_width, 1, 1))
    initialise(unet, text_encoder)
    return Denoiser(unet, text_encoder)


def train_upscaler(
    data_folder: Path,
    tokenizer_folder: Path,
    folder: Path,
    loop: LoopSettings,
    settings: UpscalerSettings = UpscalerSettings(),
) -> Denoiser:
    """Train (or resume) in `folder` on what `write_upscaler_latents` wrote; the averaged weights come back."""
    latents = torch.from_numpy(np.load(data_folder / "latents.npy"))
    small: npt.NDArray[np.uint8] = np.load(data_folder / "small.npy")
    captions = json.loads((data_folder / "captions.json").read_text(encoding="utf-8"))
    schedule, low_res_schedule = NoiseSchedule(SCHEDULE), NoiseSchedule(LOW_RES_SCHEDULE)
    denoiser = new_upscaler(tokenizer_folder, loop.seed)
    texts = TextTable(denoiser.text_encoder, captions)

    def loss_fn(module: nn.Module, _step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (settings.batch,), generator=generator)
        token_ids = texts.draw(rows, settings.caption_dropout, generator)
        levels = torch.randint(MAX_NOISE_LEVEL + 1, (settings.batch,), generator=generator)
        clean = torch.rand(settings.batch, generator=generator) < settings.clean_share
        levels = torch.where(clean, levels // 32, levels)
        low_res = to_tensor(small[rows.numpy()])
        low_res = low_res_schedule.add_noise(low_res, torch.randn(low_res.shape, generator=generator), levels)
        x0 = latents[rows].float()
        return denoising_loss(module, schedule, x0, low_res, token_ids, generator, labels=levels)

    trained = train(denoiser, loss_fn, loop, folder, "upscaler")
    assert isinstance(trained, Denoiser)
    return trained
