"""The whole score, on models of random weights: it must run to its end and find them wanting."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTokenizer

from benchmarks.score import main
from contract.card import ModelCard
from contract.spec import Task
from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.text import TextEncoder
from models.unet import UNet
from models.weights_io.folder import save_folder
from training.tokenizer import MAX_LENGTH, build_tokenizer

SIDE = 64


def write_model(folder: Path, tasks: tuple[Task, ...]) -> Path:
    """A diffusers folder with a card: an upscaler if that is its task, else an inpainting model."""
    torch.manual_seed(0)
    upscales = Task.UPSCALE in tasks
    build_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = TextEncoder.create(
        tokenizer,
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
        ),
    )
    unet = UNet(
        UNetConfig(
            sample_size=8,
            in_channels=7 if upscales else 9,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=32,
            num_class_embeds=100 if upscales else None,
        )
    )
    channels = (32,) * (3 if upscales else 4)
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=channels, layers_per_block=1))
    schedule = NoiseSchedule(ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing"))
    save_folder(LatentDiffusion(unet, autoencoder, text, schedule, schedule if upscales else None), folder)
    card = ModelCard(
        name="tiny",
        tasks=tasks,
        default_width=SIDE,
        default_height=SIDE,
        max_width=256,
        max_height=256,
        size_multiple=8,
        latent_downsample=4 if upscales else 8,
        default_steps=dict.fromkeys(tasks, 1),
        default_guidance=dict.fromkeys(tasks, 2.0),
        upscale_factor=4 if upscales else None,
        default_noise_level=10 if upscales else None,
        max_noise_level=350 if upscales else None,
    )
    (folder / "card.json").write_text(card.model_dump_json())
    return folder


def test_a_score_of_random_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_model(tmp_path / "small", (Task.TXT2IMG, Task.INPAINT))
    upscaler = write_model(tmp_path / "x4", (Task.UPSCALE,))
    out, sheet = tmp_path / "results", tmp_path / "sheet.png"
    folders = ["--model-dir", str(small), "--upscaler-dir", str(upscaler), "--out", str(out)]
    main([*folders, "--limit", "2", "--sheet", str(sheet)])
    scores = json.loads((out / "score.json").read_text())
    assert scores["prompts"]["strata"]["all"]["object"]["total"] == 6
    assert scores["prompts"]["strata"]["all"]["everything"]["right"] == 0
    assert len(scores["prompts"]["misses"]) == 6
    assert scores["inpainting"]["unmasked pixels identical"]["share"] == 1
    assert set(scores["upscaling"]) == {"model", "bicubic", "Lanczos"}
    assert (out / "score.md").read_text() in capsys.readouterr().out
    assert sheet.exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="darkroom train all"):
        main(["--model-dir", str(tmp_path)])
