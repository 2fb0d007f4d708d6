"""Tiny models of the kinds that Stable Diffusion is not, and diffusers' modules with their weights."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from transformers import BertTokenizer

from models.autoencoder import Autoencoder
from models.bert import BertConfig, BertEncoder, BertTransformer
from models.class_label import ClassConfig, ClassEncoder
from models.conditioning import Conditioner
from models.config import ScheduleConfig
from models.latent_diffusion import LatentDiffusion
from models.layout import LayoutConfig, LayoutEncoder
from models.schedule import NoiseSchedule
from models.unet import UNet
from tests.models.small import diffusers, randomise, theirs
from tests.models.structures import AUTOENCODERS, CONTEXT, UNETS

BERT: Final[dict[str, int]] = {
    "encoder_layers": 2,
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "head_dim": 3,
    "d_model": CONTEXT,
}
WORDS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##dog", "cafe", "!", ",")
CLASSES: Final = 5
SEMANTIC_CLASSES: Final = 7


def bert_encoder() -> BertEncoder:
    """As long as the published one, whose length diffusers' pipeline takes for granted."""
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    return BertEncoder(tokenizer, BertTransformer(BertConfig(vocab_size=len(WORDS), **BERT)))


def class_encoder() -> ClassEncoder:
    return ClassEncoder(ClassConfig(num_classes=CLASSES + 1, width=CONTEXT, unconditional=CLASSES))


def layout_encoder() -> LayoutEncoder:
    """A grid of 8 x 8 corners, 4 object classes."""
    transformer = BertConfig(vocab_size=66, max_position_embeddings=14, **BERT)
    return LayoutEncoder(LayoutConfig(num_classes=4, max_objects=4, transformer=transformer))


_LDM: Final = ScheduleConfig(beta_start=0.0015, beta_end=0.0195)
_PARTS: Final[dict[str, tuple[str, str, ScheduleConfig]]] = {
    "text2im": ("text2im_large", "kl_f8", ScheduleConfig()),
    "class": ("cin256_v2", "vq_f4", _LDM),
    "class_f8": ("cin256", "vq_f8", _LDM),
    "layout": ("layout2img", "vq_f4", ScheduleConfig(beta_start=0.0015, beta_end=0.0205)),
    "semantic": ("semantic", "vq_f4", ScheduleConfig(beta_start=0.0015, beta_end=0.0205)),
    "inpainting_big": ("inpainting_big", "vq_f4_noattn", ScheduleConfig(beta_start=0.0015, beta_end=0.0205)),
    "super_resolution": ("sr_4x", "vq_f4", ScheduleConfig(beta_start=0.0015, beta_end=0.0155)),
    "celeba": ("celeba", "vq_f4", _LDM),
    "churches": ("churches", "kl_f8", ScheduleConfig(beta_start=0.0015, beta_end=0.0155)),
}
_CONDITIONERS: Final = {
    "text2im": bert_encoder,
    "class": class_encoder,
    "class_f8": class_encoder,
    "layout": layout_encoder,
}
FAMILIES: Final = tuple(_PARTS)


def family(name: str) -> LatentDiffusion:
    unet_name, autoencoder_name, schedule = _PARTS[name]
    unet, autoencoder = UNet(UNETS[unet_name]), Autoencoder(AUTOENCODERS[autoencoder_name])
    conditioner: Conditioner | None = _CONDITIONERS[name]() if name in _CONDITIONERS else None
    semantic = nn.Conv2d(SEMANTIC_CLASSES, 3, 1, bias=False) if name == "semantic" else None
    for seed, part in enumerate((unet, autoencoder, conditioner, semantic)):
        if part is not None:
            randomise(part, seed)
    return LatentDiffusion(unet, autoencoder, conditioner, NoiseSchedule(schedule), None, semantic).eval()


def their_scheduler(model: LatentDiffusion) -> Any:
    return diffusers.DDIMScheduler.from_config(model.schedule.config.to_dict())


def their_bert(transformer: BertTransformer) -> Any:
    library = diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion
    model = library.LDMBertModel(library.LDMBertConfig(**transformer.config.to_dict())).eval()
    model.model.load_state_dict(transformer.state_dict())
    return model


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    generator: torch.Generator,
    latents: torch.Tensor,
    *,
    steps: int,
    eta: float,
    contexts: torch.Tensor | None = None,
    scale: float = 1.0,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """DDIM with diffusers' modules: contexts [1 or 2, L, D], with two of them guided; `beside` is concatenated."""
    unet, scheduler = theirs(model.unet), their_scheduler(model)
    scheduler.set_timesteps(steps)
    rows = 1 if contexts is None else contexts.shape[0]
    for t in scheduler.timesteps:
        inputs = latents if beside is None else torch.cat([latents, beside], dim=1)
        given = {} if contexts is None else {"encoder_hidden_states": contexts}
        out = unet(inputs.expand(rows, -1, -1, -1), t, **given).sample
        if rows == 2:
            out = out[:1] + scale * (out[1:] - out[:1])
        latents = scheduler.step(out, t, latents, eta=eta, generator=generator).prev_sample
    return latents
