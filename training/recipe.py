"""The recipe of the shipped models, stage by stage: every number that made `weights/`, and the folders between them.

Each stage goes on where it was interrupted and does nothing once its result is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig
from training.assemble import save_small, save_small_x4
from training.autoencoder import SMALL, SMALL_X4, AutoencoderSettings, train_autoencoder
from training.data import PictureDataset, write_dataset
from training.diffusion import train_diffusion
from training.latents import read_latents, write_latents
from training.loop import LoopSettings
from training.tokenizer import build_tokenizer
from training.upscaler import train_upscaler, write_upscaler_latents


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The defaults made the shipped models on a CPU; a GPU can afford more of everything."""

    pictures: int = 49_152
    side: int = 128
    data_seed: int = 1
    autoencoder: LoopSettings = field(default_factory=lambda: LoopSettings(steps=4_200, warmup=50))
    autoencoder_x4: LoopSettings = field(default_factory=lambda: LoopSettings(steps=3_000, warmup=50))
    latents: int = 32_768
    masked_latents: int = 8_192
    diffusion: LoopSettings = field(default_factory=lambda: LoopSettings(steps=7_500))
    upscaler_latents: int = 16_384
    upscaler_seed: int = 2
    upscaler: LoopSettings = field(default_factory=lambda: LoopSettings(steps=6_000))


class Workshop:
    """The stages over one folder of runs; `weights` is where the finished models go."""

    def __init__(self, runs: Path, weights: Path, recipe: Recipe, processes: int = 1) -> None:
        self.runs, self.weights, self.recipe, self.processes = runs, weights, recipe, processes

    @property
    def stages(self) -> dict[str, Callable[[], None]]:
        """In the order in which each needs the ones before."""
        return {
            "data": self.data,
            "autoencoder": self.autoencoder,
            "diffusion": self.diffusion,
            "upscaler": self.upscaler,
        }

    def data(self) -> None:
        """Tokenizer and pictures."""
        build_tokenizer(self.runs / "tokenizer")
        recipe = self.recipe
        write_dataset(self.runs / "data", recipe.pictures, recipe.data_seed, recipe.side, self.processes)

    def autoencoder(self) -> None:
        """Both first stages: f = 8 for making pictures, f = 4 for the upscaler."""
        settings = AutoencoderSettings()
        self._autoencoder("autoencoder", SMALL, self.recipe.autoencoder, settings)
        self._autoencoder(
            "autoencoder-x4", SMALL_X4, self.recipe.autoencoder_x4, dataclasses.replace(settings, batch=8)
        )

    def _autoencoder(
        self, name: str, config: AutoencoderConfig, loop: LoopSettings, settings: AutoencoderSettings
    ) -> None:
        if self._weights(name).exists():
            return
        trained = train_autoencoder(self.runs / "data", self.runs / name, config, loop, settings)
        scale = torch.tensor(trained.config.scaling_factor)
        save_file({**trained.state_dict(), "scaling_factor": scale}, self._weights(name))

    def diffusion(self) -> None:
        """Latents, then the UNet and its text encoder; ends with `weights/darkroom-small`."""
        autoencoder = self._load("autoencoder", SMALL)
        folder = self.runs / "latents"
        if not (folder / "captions.json").exists():
            data = PictureDataset(self.runs / "data")
            write_latents(
                autoencoder, data, folder, self.recipe.latents, self.recipe.masked_latents, self.recipe.data_seed
            )
        tokenizer = self.runs / "tokenizer"
        denoiser = train_diffusion(read_latents(folder), tokenizer, self.runs / "diffusion", self.recipe.diffusion)
        save_small(denoiser, autoencoder, self.weights)

    def upscaler(self) -> None:
        """Latents of large pictures beside small ones, then the upscaler; ends with `weights/darkroom-small-x4`."""
        autoencoder = self._load("autoencoder-x4", SMALL_X4)
        folder = self.runs / "latents-x4"
        if not (folder / "captions.json").exists():
            recipe = self.recipe
            write_upscaler_latents(autoencoder, folder, recipe.upscaler_latents, recipe.upscaler_seed, recipe.side)
        denoiser = train_upscaler(folder, self.runs / "tokenizer", self.runs / "upscaler", self.recipe.upscaler)
        save_small_x4(denoiser, autoencoder, self.weights)

    def _weights(self, name: str) -> Path:
        return self.runs / name / "autoencoder.safetensors"

    def _load(self, name: str, config: AutoencoderConfig) -> Autoencoder:
        tensors = load_file(self._weights(name))
        scale = round(float(tensors.pop("scaling_factor")), 5)
        autoencoder = Autoencoder(dataclasses.replace(config, scaling_factor=scale))
        autoencoder.load_state_dict(tensors)
        return autoencoder.eval().requires_grad_(False)
