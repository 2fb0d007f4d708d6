"""Seconds per picture of the shipped model: ours beside diffusers, and the whole service from POST to file.

`python -m benchmarks.latency`. 128x128, 20 guided steps, two threads; the rounds are interleaved, figures are medians.
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cli.client import DarkroomClient
from cli.server import SHIPPED_MODELS
from cli.stack import Stack, StackConfig
from contract.spec import Task
from models.latent_diffusion import LatentDiffusion
from models.tasks import PictureRequest
from worker.engine.engine import Engine

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
PROMPT, SIDE, STEPS, GUIDANCE, THREADS = "a pizza on a blue background", 128, 20, 4.0, 2


def with_diffusers(folder: Path) -> Callable[[int], object]:
    pipeline: Any = importlib.import_module("diffusers").StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch.float32)
    blank, everywhere = Image.new("RGB", (SIDE, SIDE)), Image.new("L", (SIDE, SIDE), 255)

    def draw(seed: int) -> object:
        return pipeline(
            prompt=PROMPT,
            image=blank,
            mask_image=everywhere,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
        )

    return draw


def with_engine(folder: Path) -> Callable[[int], object]:
    engine = Engine({folder.name: LatentDiffusion.load(folder)})

    def draw(seed: int) -> object:
        request = PictureRequest("txt2img", PROMPT, SIDE, SIDE, seed=seed, steps=STEPS, guidance_scale=GUIDANCE)
        engine.submit(f"row-{seed}", folder.name, request)
        events = []
        while not engine.idle:
            events += engine.tick()
        return events

    return draw


def over_http(client: DarkroomClient) -> Callable[[int], object]:
    def draw(seed: int) -> object:
        fields = {"prompt": PROMPT, "steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
        job = client.submit(Task.TXT2IMG, fields)
        for _ in client.follow(job):
            pass
        return client.download(client.result(job).images[0])

    return draw


def interleaved(ways: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(rounds + 1):
        for name, draw in ways.items():
            begun = time.perf_counter()
            draw(seed)
            if seed:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(rounds: int) -> dict[str, float]:
    torch.set_num_threads(THREADS)
    folder = WEIGHTS / "darkroom-small"
    with tempfile.TemporaryDirectory(prefix="darkroom-") as data:
        begun = time.perf_counter()
        with Stack(StackConfig(Path(data), WEIGHTS, SHIPPED_MODELS)) as stack, DarkroomClient(stack.url) as client:
            over_http(client)(0)
            first = time.perf_counter() - begun
            ways = {
                "diffusers": with_diffusers(folder),
                "engine": with_engine(folder),
                "POST to file": over_http(client),
            }
            medians = interleaved(ways, rounds)
    return {
        **medians,
        "start to first picture": first,
        "engine, times diffusers": medians["diffusers"] / medians["engine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.json"))
    arguments = parser.parse_args()
    figures = measure(arguments.rounds)
    for name, value in figures.items():
        print(f"{name:26} {value:.2f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rounds": arguments.rounds, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
