"""The recipe of the shipped models, stage by stage: every number that made `weights/`, and the folders between them.

Each stage goes on where it was interrupted and does nothing once its result is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig
from training.assemble import save_small, save_small_x4
from training.autoencoder import SMALL, SMALL_X4, AutoencoderSettings, train_autoencoder
from training.data import PictureDataset, write_dataset
from training.diffusion import DiffusionSettings, train_diffusion
from training.latents import read_latents, write_latents
from training.loop import LoopSettings
from training.tokenizer import build_tokenizer
from training.upscaler import UpscalerSettings, train_upscaler, write_upscaler_latents


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The defaults made the shipped models on a CPU.

    `first_stage`, `second_stage` and `upscaler_stage` say what a step of the autoencoders, of the diffusion and of
    the upscaler trains on; the `LoopSettings` beside them, how many steps and how fast.
    """

    pictures: int = 49_152
    side: int = 128
    data_seed: int = 1
    autoencoder: LoopSettings = field(default_factory=lambda: LoopSettings(steps=4_200, warmup=50))
    autoencoder_x4: LoopSettings = field(default_factory=lambda: LoopSettings(steps=3_000, warmup=50))
    first_stage: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    x4_batch: int = 8
    latents: int = 32_768
    masked_latents: int = 8_192
    diffusion: LoopSettings = field(default_factory=lambda: LoopSettings(steps=7_500))
    second_stage: DiffusionSettings = field(default_factory=DiffusionSettings)
    upscaler_latents: int = 6_144
    upscaler_seed: int = 2
    upscaler: LoopSettings = field(default_factory=lambda: LoopSettings(steps=1_300, warmup=50, decay_from=0.4))
    upscaler_stage: UpscalerSettings = field(default_factory=UpscalerSettings)


QUICK: Final = Recipe(
    pictures=192,
    side=64,
    autoencoder=LoopSettings(steps=60, warmup=5, log_every=5),
    autoencoder_x4=LoopSettings(steps=40, warmup=5, log_every=5),
    latents=192,
    masked_latents=64,
    diffusion=LoopSettings(steps=60, warmup=5, ema=0.9, log_every=5),
    second_stage=DiffusionSettings(batch=16),
    upscaler_latents=64,
    upscaler=LoopSettings(steps=30, warmup=5, ema=0.9, log_every=5),
)
"""Every stage in about a minute on one thread, at half size: shows that all parts work, and draws nothing yet."""


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
        recipe = self.recipe
        self._autoencoder("autoencoder", SMALL, recipe.autoencoder, recipe.first_stage)
        settings = dataclasses.replace(recipe.first_stage, batch=recipe.x4_batch)
        self._autoencoder("autoencoder-x4", SMALL_X4, recipe.autoencoder_x4, settings)

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
        folder, recipe = self.runs / "latents", self.recipe
        if not (folder / "captions.json").exists():
            data = PictureDataset(self.runs / "data")
            write_latents(autoencoder, data, folder, recipe.latents, recipe.masked_latents, recipe.data_seed)
        tokenizer, out = self.runs / "tokenizer", self.runs / "diffusion"
        denoiser = train_diffusion(read_latents(folder), tokenizer, out, recipe.diffusion, recipe.second_stage)
        save_small(denoiser, autoencoder, self.weights)

    def upscaler(self) -> None:
        """Latents of large pictures beside small ones, then the upscaler; ends with `weights/darkroom-small-x4`."""
        autoencoder = self._load("autoencoder-x4", SMALL_X4)
        folder, recipe = self.runs / "latents-x4", self.recipe
        if not (folder / "captions.json").exists():
            write_upscaler_latents(autoencoder, folder, recipe.upscaler_latents, recipe.upscaler_seed, recipe.side)
        tokenizer, out = self.runs / "tokenizer", self.runs / "upscaler"
        denoiser = train_upscaler(folder, tokenizer, out, recipe.upscaler, recipe.upscaler_stage)
        save_small_x4(denoiser, autoencoder, self.weights)

    def _weights(self, name: str) -> Path:
        return self.runs / name / "autoencoder.safetensors"

    def _load(self, name: str, config: AutoencoderConfig) -> Autoencoder:
        path = self._weights(name)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: train it first with `darkroom train autoencoder`")
        tensors = load_file(path)
        scale = round(float(tensors.pop("scaling_factor")), 5)
        autoencoder = Autoencoder(dataclasses.replace(config, scaling_factor=scale))
        autoencoder.load_state_dict(tensors)
        return autoencoder.eval().requires_grad_(False)
