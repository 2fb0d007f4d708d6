"""Files of random weights in the original layout, one for each published family of models, at small widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.models.original_parts import Bert, FirstStage, OpenClip
from tests.models.original_unet import UNetModel
from tests.models.small import write_tokenizer

CONTEXT: Final = 64
POOLED: Final = 48
SINUSOIDS: Final = 256
"""Of each of SDXL's six sizes, whatever the UNet's width."""
VOCABULARY: Final = 58  # of `write_tokenizer`
LENGTH: Final = 12
WORDS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##dog")
SMALL: Final = (32, 32, 64, 64)


def kl(z: int = 4, widths: tuple[int, ...] = SMALL) -> FirstStage:
    return FirstStage(widths, z)


def vq(z: int = 3, widths: tuple[int, ...] = SMALL[:3], **options: Any) -> FirstStage:
    return FirstStage(widths, z, codes=20, **options)


def clip() -> nn.Module:
    """Its keys as published: behind `text_model.`, which transformers 5 has dropped."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=CONTEXT,
        intermediate_size=2 * CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
    )
    return nn.ModuleDict({"transformer": nn.ModuleDict({"text_model": CLIPTextModel(config)})})


def open_clip() -> nn.Module:
    return nn.ModuleDict({"model": OpenClip(VOCABULARY, CONTEXT, depth=3, length=LENGTH)})


def clip_pair() -> nn.Module:
    """SDXL's, below `conditioner`."""
    second = nn.ModuleDict({"model": OpenClip(VOCABULARY, CONTEXT, depth=3, length=LENGTH, projection=POOLED)})
    return nn.ModuleDict({"embedders": nn.ModuleList([clip(), second])})


def bert(vocabulary: int, length: int) -> nn.Module:
    return nn.ModuleDict({"transformer": Bert(vocabulary, CONTEXT, 48, depth=2, length=length)})


@dataclasses.dataclass(frozen=True)
class Case:
    """Three modules, and what our model made of their weights shall be."""

    unet: Callable[[], UNetModel]
    first_stage: Callable[[], FirstStage]
    conditioner: Callable[[], nn.Module] | None
    tasks: set[str]
    conditioning: str
    pipeline: str
    betas: tuple[float, float]
    scale: float = 1.0
    prediction: str = "epsilon"
    use_ema: bool = True
    factor: float | None = None
    """The buffer `scale_factor`, where the file has it."""


def unet(channels: tuple[int, int], multiples: tuple[int, ...], attention: tuple[int, ...], **options: Any) -> Any:
    return lambda: UNetModel(channels, 32, multiples, attention, **options)


EVERY: Final = {"txt2img", "img2img", "inpaint"}
_SD: Final[dict[str, Any]] = {
    "first_stage": kl,
    "tasks": EVERY,
    "conditioning": "text",
    "scale": 0.18215,
    "betas": (0.00085, 0.012),
    "use_ema": False,
}
_LDM: Final[dict[str, Any]] = {"first_stage": vq, "tasks": EVERY}
_HEADS: Final[dict[str, Any]] = {"heads": 8, "context": CONTEXT}
_WIDE: Final[dict[str, Any]] = {"head_width": 64, "context": CONTEXT, "linear": True}

CASES: Final[dict[str, Case]] = {
    "sd1": Case(unet((4, 4), (1, 2, 2), (1, 2), **_HEADS), conditioner=clip, pipeline="StableDiffusionPipeline", **_SD),
    "sd1 inpainting": Case(
        unet((9, 4), (1, 2), (1,), **_HEADS, layers=2),
        conditioner=clip,
        pipeline="StableDiffusionInpaintPipeline",
        **_SD,
    ),
    "sd2": Case(
        lambda: UNetModel((4, 4), 64, (1, 2, 2), (1, 2), **_WIDE),
        conditioner=open_clip,
        prediction="v_prediction",
        pipeline="StableDiffusionPipeline",
        **_SD,
    ),
    "sd2 inpainting": Case(
        lambda: UNetModel((9, 4), 64, (1, 2, 2), (1, 2), **_WIDE),
        conditioner=open_clip,
        pipeline="StableDiffusionInpaintPipeline",
        **_SD,
    ),
    "sd x4": Case(
        unet(
            (7, 4),
            (1, 3, 3, 2),
            (2, 4, 8),
            **_HEADS,
            linear=True,
            classes=1000,
            only_cross=(True, True, True, False),
        ),
        conditioner=open_clip,
        prediction="v_prediction",
        pipeline="StableDiffusionUpscalePipeline",
        **{
            **_SD,
            "first_stage": lambda: kl(4, SMALL[:3]),
            "tasks": {"upscale"},
            "scale": 0.08333,
            "betas": (0.0001, 0.02),
        },
    ),
    "sdxl": Case(
        lambda: UNetModel(
            (4, 4),
            64,
            (1, 2, 4),
            (2, 4),
            head_width=64,
            context=2 * CONTEXT,
            linear=True,
            depth=(1, 2, 3),
            added=POOLED + 6 * SINUSOIDS,
        ),
        conditioner=clip_pair,
        pipeline="StableDiffusionXLPipeline",
        **{**_SD, "scale": 0.13025},
    ),
    "sdxl inpainting": Case(
        lambda: UNetModel(
            (9, 4), 64, (1, 2), (2,), context=2 * CONTEXT, linear=True, added=POOLED + 6 * SINUSOIDS, head_width=64
        ),
        conditioner=clip_pair,
        pipeline="StableDiffusionXLInpaintPipeline",
        **{**_SD, "scale": 0.13025},
    ),
    "text2im": Case(
        unet((4, 4), (1, 2, 4, 4), (1, 2, 4), **_HEADS),
        conditioner=lambda: bert(len(WORDS), 77),
        pipeline="LDMTextToImagePipeline",
        **_SD,
    ),
    "layout": Case(
        unet((3, 3), (1, 2), (2,), context=CONTEXT, depth=3),
        conditioner=lambda: bert(66, 14),
        conditioning="layout",
        betas=(0.0015, 0.0205),
        pipeline="DarkroomLayoutPipeline",
        **_LDM,
    ),
    "class": Case(
        unet((3, 3), (1, 2, 3, 5), (2, 4, 8), heads=1, context=CONTEXT),
        conditioner=lambda: nn.ModuleDict({"embedding": nn.Embedding(6, CONTEXT)}),
        conditioning="class",
        betas=(0.0015, 0.0195),
        pipeline="DarkroomClassPipeline",
        use_ema=False,
        **_LDM,
    ),
    "class f8": Case(
        unet((4, 4), (1, 2, 4), (1, 2, 4), context=CONTEXT),
        first_stage=lambda: vq(4, SMALL, attention=(True, True)),
        conditioner=lambda: nn.ModuleDict({"embedding": nn.Embedding(5, CONTEXT)}),
        tasks=EVERY,
        conditioning="class",
        betas=(0.0015, 0.0195),
        pipeline="DarkroomClassPipeline",
    ),
    "super resolution": Case(
        unet((6, 3), (1, 2, 2, 4), (8,)),
        first_stage=vq,
        conditioner=None,
        tasks={"upscale"},
        conditioning="none",
        betas=(0.0015, 0.0155),
        pipeline="LDMSuperResolutionPipeline",
    ),
    "inpainting big": Case(
        unet((7, 3), (1, 2, 3, 4), (2, 4, 8), heads=8, updown=True),
        first_stage=lambda: vq(attention=(False, False)),
        conditioner=None,
        tasks={"inpaint"},
        conditioning="none",
        betas=(0.0015, 0.0205),
        pipeline="DarkroomInpaintPipeline",
    ),
    "semantic": Case(
        unet((6, 3), (1, 4, 8), (32, 16, 8), heads=8),
        first_stage=vq,
        conditioner=lambda: nn.ModuleDict({"channel_mapper": nn.Conv2d(7, 3, 1, bias=False)}),
        tasks={"txt2img"},
        conditioning="semantic",
        betas=(0.0015, 0.0205),
        pipeline="DarkroomSemanticPipeline",
    ),
    "churches": Case(
        unet((4, 4), (1, 2, 2, 4, 4), (1, 2, 4, 8), heads=8, scale_shift=True, updown=True),
        first_stage=kl,
        conditioner=None,
        tasks=EVERY,
        conditioning="none",
        betas=(0.0015, 0.0155),
        pipeline="LDMPipeline",
        scale=0.22765929,
        factor=0.22765929,
    ),
    "celeba": Case(
        unet((3, 3), (1, 2, 3, 4), (2, 4, 8), layers=2),
        conditioner=None,
        conditioning="none",
        betas=(0.0015, 0.0195),
        pipeline="LDMPipeline",
        **_LDM,
    ),
}


@dataclasses.dataclass(frozen=True)
class Original:
    """The modules whose weights a file holds."""

    unet: UNetModel
    first_stage: FirstStage
    conditioner: nn.Module | None
    tensors: dict[str, Tensor]


def make(name: str) -> Original:
    """With what else such files hold: constants of the diffusion, a loss, parts that nothing reads."""
    torch.manual_seed(3)
    case = CASES[name]
    unet, first_stage = case.unet(), case.first_stage()
    conditioner = None if case.conditioner is None else case.conditioner()
    for module in (unet, first_stage, conditioner):
        for child in () if module is None else module.modules():
            if isinstance(child, nn.GroupNorm | nn.LayerNorm):
                nn.init.normal_(child.weight, 1.0, 0.2)
                nn.init.normal_(child.bias, 0.0, 0.2)
    beside = "conditioner" if case.conditioner is clip_pair else "cond_stage_model"
    parts = {"model.diffusion_model": unet, "first_stage_model": first_stage, beside: conditioner}
    if name == "inpainting big":
        parts["cond_stage_model"] = first_stage
    tensors = {
        f"{prefix}.{key}": tensor.detach().clone()
        for prefix, part in parts.items()
        if part is not None
        for key, tensor in part.state_dict().items()
    }
    for buffer in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "logvar"):
        tensors[buffer] = torch.ones(1000)
    tensors["first_stage_model.loss.discriminator.main.0.weight"] = torch.ones(2, 2)
    tensors["first_stage_model.loss.logvar"] = torch.ones(())
    if case.conditioner is clip_pair:
        tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
        tensors["denoiser.sigmas"] = torch.ones(1000)
    if case.conditioner is clip:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    if name == "sd x4":
        tensors["low_scale_model.betas"] = torch.ones(1000)
    if case.factor is not None:
        tensors["scale_factor"] = torch.tensor(case.factor)
    for module in (unet, first_stage, conditioner):
        if module is not None:
            module.eval().requires_grad_(False)
    return Original(unet, first_stage, conditioner, tensors)


def write_tokenizers(folder: Path) -> None:
    """CLIP's and BERT's files for small vocabularies; no published file holds any."""
    write_tokenizer(folder / "clip")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def tokenizer_of(name: str, folder: Path) -> Path | None:
    if CASES[name].conditioning != "text":
        return None
    return folder / ("bert" if name == "text2im" else "clip")


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def token_ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
    ids: Tensor = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
