"""Random low-rank adapters for a model, written as the tools that people train with write them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.latent_diffusion import LatentDiffusion
from models.text import TextEncoder

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Down and up, by module name."""
ATTENTION = r".*\.attn\d\.to_(q|k|v|out\.0)"
EVERYWHERE = (
    r".*(proj_in|proj_out|net\.0\.proj|net\.2|conv\d?|conv_in|conv_out|conv_shortcut|time_emb_proj|linear_\d|to_.*)"
)
TEXT = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def text_root(model: LatentDiffusion) -> nn.Module:
    """What adapters name modules of."""
    assert isinstance(model.conditioner, TextEncoder)
    return model.conditioner.transformer


def random_pairs(
    root: nn.Module, pattern: str, rank: int, seed: int, gain: float = 0.5
) -> dict[str, tuple[Tensor, Tensor]]:
    """For the linear and convolution modules whose whole name matches."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name):
            shape = module.weight.shape
            down = torch.randn(rank, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5
            up = gain * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * rank**-0.5
            pairs[name] = (down, up)
    assert pairs, pattern
    return pairs


def write_peft(
    path: Path,
    unet: Pairs,
    text: Pairs | None = None,
    alphas: Mapping[str, Any] | None = None,
    text_2: Pairs | None = None,
) -> None:
    """`alphas`: settings as diffusers keeps them in the header, "unet.lora_alpha" for one."""
    tensors = {}
    parts = {"unet.": unet, "text_encoder.text_model.": text or {}, "text_encoder_2.": text_2 or {}}
    for prefix, pairs in parts.items():
        for name, (down, up) in pairs.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = down
            tensors[f"{prefix}{name}.lora_B.weight"] = up
    metadata = {"format": "pt"}
    if alphas:
        metadata["lora_adapter_metadata"] = json.dumps(alphas)
    _save(tensors, path, metadata)


def write_old_diffusers(path: Path, unet: Pairs, text: Pairs | None = None) -> None:
    """Attention processors, `lora` elsewhere, `lora_linear_layer` in the text encoder."""
    tensors = {}
    for name, pair in unet.items():
        attention, _, leaf = name.removesuffix(".0").rpartition(".")
        stem = f"unet.{name}.lora"
        if leaf in ("to_q", "to_k", "to_v", "to_out"):
            stem = f"unet.{attention}.processor.{leaf}_lora"
        for role, tensor in zip(("down", "up"), pair, strict=True):
            tensors[f"{stem}.{role}.weight"] = tensor
    for name, pair in (text or {}).items():
        for role, tensor in zip(("down", "up"), pair, strict=True):
            tensors[f"text_encoder.text_model.{name}.lora_linear_layer.{role}.weight"] = tensor
    _save(tensors, path, {"format": "pt"})


def write_kohya(
    path: Path,
    unet: Pairs,
    text: Pairs | None = None,
    alpha: float | None = None,
    te: str = "te",
    text_2: Pairs | None = None,
) -> None:
    tensors = {}
    parts = {"lora_unet_": unet, f"lora_{te}_text_model_": text or {}, "lora_te2_": text_2 or {}}
    for prefix, pairs in parts.items():
        for name, (down, up) in pairs.items():
            stem = prefix + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    _save(tensors, path, {"ss_network_module": "networks.lora"})


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)


def adapter_of(
    model: LatentDiffusion,
    write: Callable[..., None],
    path: Path,
    pattern: str = ATTENTION,
    rank: int = 3,
    seed: int = 1,
) -> Path:
    """A file for UNet and text encoder."""
    text = random_pairs(text_root(model), TEXT, rank, seed + 1000)
    write(path, random_pairs(model.unet, pattern, rank, seed), text)
    return path
