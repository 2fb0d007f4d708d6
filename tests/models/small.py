"""Small models of random weights, and the folders from which diffusers, the oracle, reads the same weights.

Plain random weights hide wrong norm epsilons, so what writes into a residual stream is scaled down: norms then see
variances near their epsilon. Norms get random gains and shifts, so that none can be left out or swapped.
"""

import importlib
import json
import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.attention import PixelAttention
from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet

diffusers: Any = importlib.import_module("diffusers")  # what types it has are wrong here and there

RESIDUAL_WRITERS = (
    *("conv_in", "conv2", "conv_shortcut", "proj_in", "to_out.0", "net.2", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("token_embedding", "position_embedding", "out_proj", "fc2"),  # CLIP's names
)
BRANCHES = ("conv_in", "conv1", "time_emb_proj", "conv2", "proj_in", "to_out.0", "net.2")
STREAM = ("conv_shortcut", "samplers.0.conv", "proj_out", "post_quant_conv")


def randomise(module: nn.Module, seed: int = 0, *, even: bool = False) -> None:
    """With `even`, no level is louder than another, so that a wrong epsilon of any norm shows in one forward; through
    the steps of a sampler, rounding would show as well."""
    generator = torch.Generator().manual_seed(seed)
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(child, nn.GroupNorm | nn.LayerNorm):
                parameter.data = 0.2 * noise + (1.0 if parameter is child.weight else 0.0)
            else:
                bias = parameter.dim() == 1
                quiet = name.endswith(BRANCHES + STREAM * bias if even else RESIDUAL_WRITERS)
                fan_in = 10 if bias else parameter[0].numel()
                parameter.data = (0.02 if quiet else 1.0) * fan_in**-0.5 * noise
    module.eval().requires_grad_(False)


def theirs(ours: UNet | Autoencoder) -> Any:
    """The same structure and weights in diffusers, strictly: the parameters have the same names."""
    data = ours.config.to_dict()
    widths = data.get("attention_head_dim")
    per_level = data["_class_name"] == "UNet2DModel" and isinstance(widths, tuple)
    if per_level:  # which it has no words for
        data["attention_head_dim"] = 1
    module = getattr(diffusers, data["_class_name"]).from_config(data).eval()
    module.load_state_dict(ours.state_dict())
    if per_level:
        for name, one in ours.named_modules():
            if isinstance(one, PixelAttention):
                module.get_submodule(name).heads = one.heads
    return module


def write_tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE reduced to lower-case letters; "cat" and "dog" are one token each."""
    folder.mkdir(parents=True)
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "pad_token": tokens[-1], "unk_token": tokens[-1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=2,
)
KL_F8 = AutoencoderConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, sample_size=64)
KL_F4 = AutoencoderConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.08333)
COSINE_V = ScheduleConfig(
    beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
)


def assemble(
    text_encoder: TextEncoder,
    autoencoder_config: AutoencoderConfig,
    unet_config: UNetConfig,
    schedule: ScheduleConfig,
    low_res_schedule: ScheduleConfig | None = None,
) -> LatentDiffusion:
    unet, autoencoder = UNet(unet_config), Autoencoder(autoencoder_config)
    randomise(unet, 1)
    randomise(autoencoder, 2)
    low_res = None if low_res_schedule is None else NoiseSchedule(low_res_schedule)
    return LatentDiffusion(unet, autoencoder, text_encoder, NoiseSchedule(schedule), low_res).eval()
