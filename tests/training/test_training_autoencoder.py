"""The first stage: resuming on real pictures, its start, and the patch discriminator."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import training.autoencoder
from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig
from training.adversarial import AdversarialAutoencoder, PatchDiscriminator, adaptive_weight, hinge_loss
from training.autoencoder import AutoencoderSettings, initialise, reconstruction_loss, to_tensor, train_autoencoder
from training.data import PictureDataset
from training.loop import LoopSettings

TINY = AutoencoderConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=64)
LOOP = LoopSettings(steps=5, warmup=1, log_every=1, save_seconds=0.0)
SETTINGS = AutoencoderSettings(batch=4, crop=32)


def test_reconstruction_loss_in_numbers() -> None:
    """A constant error of 0.5 counts in the pixels and in the 4x4 means; an edge also in the differences."""
    zero, flat = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    assert float(reconstruction_loss(flat, zero)) == pytest.approx(1.0)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 0.5
    assert float(reconstruction_loss(edge, zero)) == pytest.approx(0.25 + 0.25 + 0.5 / 7)


def test_the_start_keeps_the_signal_and_is_nearly_certain_of_it(data: PictureDataset) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        posterior = initialise(Autoencoder(TINY)).encode(to_tensor(data.pictures(range(8))))
    assert 0.2 < float(posterior.mean.std()) < 5.0
    assert float(posterior.logvar.mean()) < -3.0


def test_the_averaged_weights_give_latents_of_unit_variance(data_folder: Path, tmp_path: Path) -> None:
    trained = train_autoencoder(data_folder, tmp_path / "run", TINY, LOOP, SETTINGS)
    pixels = to_tensor(PictureDataset(data_folder).pictures(range(48)))
    assert float(trained.encode(pixels).mean.std()) * trained.config.scaling_factor == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("adversarial_from", [None, 0.5])
def test_an_interrupted_first_stage_ends_with_the_same_bits(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adversarial_from: float | None
) -> None:
    settings = dataclasses.replace(SETTINGS, adversarial_from=adversarial_from)
    whole = train_autoencoder(data_folder, tmp_path / "whole", TINY, LOOP, settings)
    calls = 0

    def interrupting(reconstruction: Tensor, pixels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return reconstruction_loss(reconstruction, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(training.autoencoder, "reconstruction_loss", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(data_folder, tmp_path / "pieces", TINY, LOOP, settings)
    resumed = train_autoencoder(data_folder, tmp_path / "pieces", TINY, LOOP, settings)
    assert resumed.config == whole.config
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_discriminator_joins_in_at_its_step(data_folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, adversarial_from=0.5)
    trained = train_autoencoder(data_folder, tmp_path / "run", TINY, LOOP, settings)
    assert set(trained.state_dict()) == set(Autoencoder(TINY).state_dict())
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["discriminator"]) > 0 for row in rows] == [False, False, True, True, True]
    assert [float(row["gan_weight"]) > 0 for row in rows] == [False, False, True, True, True]


def test_hinge_loss_in_numbers() -> None:
    assert float(hinge_loss(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3))) == 1.0
    assert float(hinge_loss(torch.tensor([2.0]), torch.tensor([-1.0]))) == 0.0
    assert float(hinge_loss(torch.tensor([0.5]), torch.tensor([1.0]))) == pytest.approx(0.5 * (0.5 + 2.0))


def test_the_adaptive_weight_makes_both_gradients_equally_long() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    assert float(adaptive_weight((3 * weight).sum(), (0.5 * weight).sum(), weight)) == pytest.approx(6.0, rel=1e-3)
    assert float(adaptive_weight((3 * weight).sum(), (0 * weight).sum(), weight)) == 1e4


def test_a_logit_is_a_patch() -> None:
    discriminator = PatchDiscriminator()
    pixels = torch.zeros(2, 3, 64, 64, requires_grad=True)
    logits = discriminator(pixels)
    assert logits.shape == (2, 1, 14, 14)


def test_each_network_learns_from_its_own_loss_alone() -> None:
    torch.manual_seed(1)
    pair = AdversarialAutoencoder(Autoencoder(TINY))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction = pair.autoencoder.decode(pair.autoencoder.encode(pixels).mean)
    l1 = reconstruction_loss(reconstruction, pixels)
    losses = pair.add_losses({"loss": l1, "l1": l1}, pixels, reconstruction, active=True)

    def gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True))

    pairs = [
        (losses["discriminator"], pair.discriminator),
        (l1 + losses["gan_weight"].detach() * losses["gan"], pair.autoencoder),
    ]
    for own, network in pairs:
        for expected, found in zip(gradients(own, network), gradients(losses["loss"], network), strict=True):
            assert torch.allclose(expected, found, atol=1e-6)
