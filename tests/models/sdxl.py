"""A tiny SDXL, with the structure of the published one."""

import dataclasses
from pathlib import Path
from typing import Any, Final

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.autoencoder import Autoencoder
from models.config import ScheduleConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.text_pair import TextPairEncoder, Tokenizers
from models.unet import UNet
from tests.models.small import randomise, write_tokenizer
from tests.models.structures import AUTOENCODERS, POOLED, SDXL

_TEXT: Final[dict[str, Any]] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}


def text_pair(folder: Path, *, empty_is_zero: bool = True) -> TextPairEncoder:
    """The tokenizers' files go to `folder`. The second pads with token 0 and, as in the published config, has an end
    token that tells transformers to look for the largest id."""
    write_tokenizer(folder / "tokenizer")
    first = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    second = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="a")
    text = {**_TEXT, "vocab_size": len(first), "bos_token_id": first.bos_token_id}
    pair = TextPairEncoder(
        Tokenizers(first, second),
        CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=3, eos_token_id=first.eos_token_id)),
        CLIPTextModelWithProjection(
            CLIPTextConfig(**text, num_hidden_layers=4, eos_token_id=2, hidden_act="gelu", projection_dim=POOLED)
        ),
        empty_is_zero=empty_is_zero,
    )
    randomise(pair)
    return pair


def sdxl(folder: Path, *, in_channels: int = 4, empty_is_zero: bool = True) -> LatentDiffusion:
    unet = UNet(dataclasses.replace(SDXL, in_channels=in_channels))
    autoencoder = Autoencoder(dataclasses.replace(AUTOENCODERS["kl_f8"], scaling_factor=0.13025))
    randomise(unet, 1)
    randomise(autoencoder, 2)
    pair = text_pair(folder, empty_is_zero=empty_is_zero)
    return LatentDiffusion(unet, autoencoder, pair, NoiseSchedule(ScheduleConfig())).eval()
