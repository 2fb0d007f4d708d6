"""Small models of random weights, the folders and pipelines of diffusers made of them, and pictures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTokenizer

from models.config import ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.text import TextEncoder
from models.weights_io.folder import save_folder
from tests.models.small import COSINE_V, KL_F4, KL_F8, UNET, assemble, randomise, write_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_inputs_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("text")
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    encoder = TextEncoder.create(tokenizer, config)
    randomise(encoder)
    return encoder


@pytest.fixture(scope="session")
def text_model(text_encoder: TextEncoder) -> LatentDiffusion:
    """4 channels, epsilon, the schedule of SD 1: txt2img and img2img."""
    return assemble(text_encoder, KL_F8, UNET, ScheduleConfig())


@pytest.fixture(scope="session")
def inpainter(text_encoder: TextEncoder) -> LatentDiffusion:
    """9 channels, v, cosine: txt2img, img2img and inpaint, as the shipped model."""
    return assemble(text_encoder, KL_F8, UNetConfig(**{**vars(UNET), "in_channels": 9}), COSINE_V)


@pytest.fixture(scope="session")
def upscaler(text_encoder: TextEncoder) -> LatentDiffusion:
    """7 channels and noise levels as classes: x4."""
    unet = UNetConfig(**{**vars(UNET), "in_channels": 7, "num_class_embeds": 30, "use_linear_projection": True})
    low_res = ScheduleConfig(beta_start=0.0001, beta_end=0.02)
    return assemble(text_encoder, KL_F4, unet, COSINE_V, low_res)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LatentDiffusion], Path]:
    """The model's folder in fp32, written once per session."""
    written: dict[LatentDiffusion, Path] = {}

    def write(model: LatentDiffusion) -> Path:
        if model not in written:
            written[model] = tmp_path_factory.mktemp("weights")
            save_folder(model, written[model], dtype=torch.float32)
        return written[model]

    return write


@pytest.fixture(scope="session")
def pipeline_of(folder_of: Callable[[LatentDiffusion], Path]) -> Callable[[LatentDiffusion, type[Any]], Any]:
    """The model as one of diffusers' pipelines, read from its folder."""
    loaded: dict[tuple[LatentDiffusion, type[Any]], Any] = {}

    def load(model: LatentDiffusion, pipeline: type[Any]) -> Any:
        if (model, pipeline) not in loaded:
            loaded[model, pipeline] = pipeline.from_pretrained(folder_of(model))
            loaded[model, pipeline].set_progress_bar_config(disable=True)
        return loaded[model, pipeline]

    return load


@pytest.fixture(scope="session")
def noise_image() -> Callable[[int, int], Image.Image]:
    """A smooth random RGB picture of width x height."""

    def draw(width: int, height: int) -> Image.Image:
        levels = np.random.default_rng(5).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        return Image.fromarray(levels, "RGB").resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture(scope="session")
def hole() -> Image.Image:
    """A 64 x 48 mask: white where to repaint, off the latent grid on three sides, with grey levels at the threshold."""
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[13:38, 8:43] = 255
    mask[13, 8:43] = 128
    mask[37, 8:43] = 127
    return Image.fromarray(mask, "L")
