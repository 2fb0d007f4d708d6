"""The diffusion loss: what is predicted, how timesteps are drawn and weighed, and what a batch is conditioned on."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.schedule import NoiseSchedule
from training.diffusion import SCHEDULE, DiffusionSettings, TextTable, _draw, new_denoiser
from training.latents import LatentDataset
from training.losses import draw_timesteps, min_snr_weight, target

NOISE_SCHEDULE = NoiseSchedule(SCHEDULE)


def test_v_is_the_velocity_of_the_noising() -> None:
    """v = d z / d phi with z = cos(phi) x0 + sin(phi) noise (Salimans & Ho 2022, appendix D)."""
    x0, noise = torch.tensor([[[[0.5]]]]), torch.tensor([[[[-2.0]]]])
    t = torch.tensor([500])
    abar = float(NOISE_SCHEDULE.alphas_cumprod[500])
    assert abar == pytest.approx(0.4923, abs=1e-4)
    expected = abar**0.5 * -2.0 - (1 - abar) ** 0.5 * 0.5
    assert float(target(NOISE_SCHEDULE, x0, noise, t)) == pytest.approx(expected, rel=1e-5)
    epsilon = NoiseSchedule(dataclasses.replace(SCHEDULE, prediction_type="epsilon"))
    assert torch.equal(target(epsilon, x0, noise, t), noise)


def test_min_snr_weights() -> None:
    """Of abar from Nichol & Dhariwal 2021, eq. 17; clean steps count little, and so do those of noise alone."""
    weights = min_snr_weight(NOISE_SCHEDULE, torch.tensor([0, 100, 250, 500, 850, 999]))
    assert weights.tolist() == pytest.approx([0.000413, 0.284243, 1.541120, 0.984570, 0.105918, 0.0], abs=1e-5)
    average = min_snr_weight(NOISE_SCHEDULE, torch.arange(1000)).mean()
    assert 0.5 < float(average) < 1.0


def test_timesteps_favour_the_noisy_range() -> None:
    t = draw_timesteps(20_000, 1000, torch.Generator().manual_seed(1))
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999
    noisy = ((t >= 600) & (t < 950)).float().mean()
    assert float(noisy) == pytest.approx(0.4 + 0.6 * 0.35, abs=0.01)


def test_captions_are_dropped_in_their_share(tokenizer: Path) -> None:
    texts = TextTable(new_denoiser(tokenizer, 0).text_encoder, ["a pizza on a blue background", "two red hearts"])
    rows = torch.arange(2).repeat(4000)
    ids = texts.draw(rows, 0.1, torch.Generator().manual_seed(2))
    dropped = (ids == texts.empty).all(dim=1)
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(ids[~dropped], texts.ids[rows][~dropped])
    assert torch.equal(texts.draw(rows, 0.0, torch.Generator().manual_seed(2)), texts.ids[rows])


def test_a_batch_has_its_share_of_holes_and_the_rest_is_painted_whole() -> None:
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.half)
    masks[:, :, 2:5, 2:5] = 1
    latents = torch.arange(10.0).half().view(10, 1, 1, 1).expand(10, 4, 8, 8)
    data = LatentDataset(latents, ["a pizza"] * 10, masks, -latents[:3], torch.full((4, 8, 8), 9.0).half())
    settings = DiffusionSettings(batch=20, inpaint_share=0.25)
    rows, x0, conditioning = _draw(data, settings, torch.Generator().manual_seed(3))
    assert torch.equal(x0[:, 0, 0, 0], rows.float())
    assert int(rows[:5].max()) < 3
    assert torch.equal(conditioning[:5, :1], masks[rows[:5]].float())
    assert torch.equal(conditioning[:5, 1:], -latents[rows[:5]].float())
    assert torch.equal(conditioning[5:, :1], torch.ones(15, 1, 8, 8))
    assert torch.equal(conditioning[5:, 1:], torch.full((15, 4, 8, 8), 9.0))
