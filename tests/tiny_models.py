"""Tiny random models with the structures of the shipped ones, and the folders that a worker loads them from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from contract.card import ModelCard, Vocabulary
from contract.spec import Task
from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet
from models.weights_io.folder import save_folder
from training.tokenizer import MAX_LENGTH, build_tokenizer, caption_words

BASE = "tiny"
UPSCALER = "tiny-x4"
_WIDTH = 16
_SCHEDULE = ScheduleConfig(
    beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
)


def tiny_base(folder: Path) -> LatentDiffusion:
    """9-channel UNet over f8 latents: txt2img, img2img, inpaint. The tokenizer's files go to `folder`."""
    torch.manual_seed(1)
    autoencoder = AutoencoderConfig(
        block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.7
    )
    return _assemble(folder, _unet(in_channels=9), autoencoder)


def tiny_upscaler(folder: Path) -> LatentDiffusion:
    """7-channel UNet with noise levels as class labels, over f4 latents: upscale."""
    torch.manual_seed(2)
    autoencoder = AutoencoderConfig(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.7
    )
    low_res = NoiseSchedule(ScheduleConfig(beta_start=0.0001, beta_end=0.02))
    return _assemble(folder, _unet(in_channels=7, num_class_embeds=350), autoencoder, low_res)


def _unet(in_channels: int, num_class_embeds: int | None = None) -> UNetConfig:
    return UNetConfig(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(_WIDTH, 2 * _WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=_WIDTH,
        norm_num_groups=4,
        num_class_embeds=num_class_embeds,
    )


def _assemble(
    folder: Path, unet: UNetConfig, autoencoder: AutoencoderConfig, low_res: NoiseSchedule | None = None
) -> LatentDiffusion:
    build_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    parts = (UNet(unet), Autoencoder(autoencoder), TextEncoder.create(tokenizer, text))
    model = LatentDiffusion(*parts, NoiseSchedule(_SCHEDULE), low_res).eval().requires_grad_(False)
    _make_text_and_time_matter(model.unet)
    return model


def _make_text_and_time_matter(unet: UNet) -> None:
    """At PyTorch's initial weights both hardly change the output, so that mixed-up rows would go unnoticed."""
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_v", "attn2.to_out.0", "time_emb_proj")) and isinstance(module, nn.Linear):
            module.weight.mul_(4.0)


def save_tiny_models(folder: Path) -> None:
    """`folder`/tiny and `folder`/tiny-x4, each a model folder with its card.json, in fp32."""
    for card, build in ((base_card(), tiny_base), (upscaler_card(), tiny_upscaler)):
        save_folder(build(folder / f"{card.name}-tokenizer"), folder / card.name, dtype=torch.float32)
        (folder / card.name / "card.json").write_text(card.model_dump_json(), encoding="utf-8")


def save_tiny_as_shipped(folder: Path) -> None:
    """The same under the names of the shipped models, for pictures of their sizes."""
    save_tiny_models(folder)
    for card, name, side in ((base_card(), "darkroom-small", 128), (upscaler_card(), "darkroom-small-x4", 512)):
        sizes = {"default_width": side, "default_height": side, "max_width": 512, "max_height": 512}
        (folder / card.name).rename(folder / name)
        card = card.model_copy(update={"name": name, **sizes})
        (folder / name / "card.json").write_text(card.model_dump_json(), encoding="utf-8")


def base_card() -> ModelCard:
    tasks = (Task.TXT2IMG, Task.IMG2IMG, Task.INPAINT)
    return ModelCard(
        name=BASE,
        tasks=tasks,
        default_width=64,
        default_height=64,
        max_width=128,
        max_height=128,
        size_multiple=8,
        latent_downsample=8,
        default_steps=dict.fromkeys(tasks, 4),
        default_guidance=dict.fromkeys(tasks, 3.0),
        max_tokens=MAX_LENGTH,
        vocabulary=Vocabulary(objects=("pizza",), colours=("blue",), words=tuple(caption_words())),
    )


def upscaler_card() -> ModelCard:
    return ModelCard(
        name=UPSCALER,
        tasks=(Task.UPSCALE,),
        default_width=64,
        default_height=64,
        max_width=128,
        max_height=128,
        size_multiple=4,
        latent_downsample=4,
        default_steps={Task.UPSCALE: 4},
        default_guidance={Task.UPSCALE: 1.0},
        upscale_factor=4,
        default_noise_level=20,
        max_noise_level=349,
        max_tokens=MAX_LENGTH,
    )
