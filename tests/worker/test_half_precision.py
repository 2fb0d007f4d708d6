"""Every published structure in half precision, on the CPU and on a GPU where there is one, against fp32 on the CPU."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.attention import Attention, fused_attention, plain_attention, set_attention
from models.autoencoder import Autoencoder
from models.config import ScheduleConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.unet import UNet
from tests.models.small import randomise
from tests.models.structures import AUTOENCODERS, SIZES, UNETS
from worker.engine.tuning import Dtype, TunedUNet, Tuning, Workshop, tune

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FAR: dict[Dtype, float] = {"bfloat16": 0.05, "float16": 0.01}
"""Allowed distance, relative to the output's norm: some ten roundings of 2^-9 and 2^-12 one after the other."""

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("dtype", list(FAR))]


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.float().cpu() - expected).norm() / expected.norm())


@torch.inference_mode()
@pytest.mark.parametrize("name", UNETS)
def test_unets(name: str, dtype: Dtype, device: str) -> None:
    config = UNETS[name]
    plain = UNet(config)
    randomise(plain, even=True)
    half = TunedUNet(plain, Workshop(Tuning(dtype))).eval().to(device)
    x, t = torch.randn(2, config.in_channels, 16, 16), torch.tensor([1, 999])
    labels = None if config.num_class_embeds is None else torch.tensor([3, 20])
    context = None if config.cross_attention_dim is None else torch.randn(4, 7, config.cross_attention_dim)
    sizes = torch.tensor([SIZES] * 4)
    pooled = torch.randn(4, config.pooled_width) if config.pooled_width else None
    expected = plain(x, t, context, labels, None if pooled is None else plain.embed_addition(pooled, sizes))
    torch_dtype = Tuning(dtype).torch_dtype
    added = None if pooled is None else half.embed_addition(pooled.to(device, torch_dtype), sizes.to(device))
    emb = half.embed(t.to(device), None if labels is None else labels.to(device), added)
    kv = [] if context is None else half.project_context(context.to(device, torch_dtype))
    assert distance(half.denoise(x.to(device, torch_dtype), emb, kv), expected) < FAR[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders(name: str, dtype: Dtype, device: str) -> None:
    config = AUTOENCODERS[name]
    plain = Autoencoder(config)
    randomise(plain, even=True)
    half = Workshop(Tuning(dtype)).tree(plain).eval().to(device)
    assert isinstance(half, Autoencoder)
    side = 2 * config.downsampling_factor
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    torch_dtype = Tuning(dtype).torch_dtype
    assert distance(half.encode(pixels.to(device, torch_dtype)).mean, plain.encode(pixels).mean) < FAR[dtype]
    if config.codebook_size is None:  # else the nearest code may be another one
        latents = torch.randn(1, config.latent_channels, 4, 4)
        assert distance(half.decode(latents.to(device, torch_dtype)), plain.decode(latents)) < FAR[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("attend", [plain_attention, fused_attention])
def test_scores_beyond_the_range_of_fp16(attend: object, dtype: Dtype, device: str) -> None:
    """SD 2.1's do not fit (`upcast_attention`): the scores here are about 10^5."""
    attention = Attention(64, 1, upcast=True)
    for one in (attention.to_q, attention.to_k):
        one.weight.copy_(one.weight * math.sqrt(1e5 / 64) * 8)
    set_attention(attention, attend)  # type: ignore[arg-type]
    x = torch.randn(1, 9, 64)
    scores = attention.to_q(x) @ attention.to_k(x).transpose(1, 2)
    assert scores.abs().max() > torch.finfo(torch.float16).max
    half = attention.to(device, Tuning(dtype).torch_dtype)
    assert half(x.to(device, Tuning(dtype).torch_dtype)).isfinite().all()


@torch.inference_mode()
def test_decoders_beyond_the_range_of_fp16(dtype: Dtype, device: str) -> None:
    """Activations of SDXL's and the x4-upscaler's decoders leave it: `force_upcast` keeps them in fp32."""
    unet, autoencoder = UNet(UNETS["celeba"]), Autoencoder(AUTOENCODERS["kl_f4"])
    randomise(unet, even=True)
    randomise(autoencoder, even=True)
    autoencoder.decoder.conv_in.weight.mul_(1e7)
    inside: list[float] = []
    autoencoder.decoder.conv_in.register_forward_hook(lambda _, __, h: inside.append(h.abs().max().item()))
    model = LatentDiffusion(unet, autoencoder, None, NoiseSchedule(ScheduleConfig())).eval()
    latents = torch.randn(1, 3, 4, 4)
    expected = model.decode_latents(latents)
    assert inside[0] > torch.finfo(torch.float16).max
    half = tune(model.to(device), Tuning(dtype))
    assert distance(half.decode_latents(latents.to(device)), expected) < FAR[dtype]


@torch.inference_mode()
def test_norms_of_large_values(dtype: Dtype, device: str) -> None:
    """The squares of 30,000 do not fit into fp16: norms must sum in fp32."""
    norm = nn.GroupNorm(2, 8)
    x = 3e4 * torch.randn(1, 8, 16, 16).clamp(-2, 2)
    half = Workshop(Tuning(dtype)).norm(norm).to(device)
    assert distance(half(x.to(device, Tuning(dtype).torch_dtype)), norm(x)) < FAR[dtype]
