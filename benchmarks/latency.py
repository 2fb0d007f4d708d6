"""Seconds per picture of the shipped model: ours beside diffusers, and the whole service from POST to file.

`make bench-latency`. 128x128, 20 guided steps, two threads; the rounds are interleaved, figures are medians.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from benchmarks.report import FOLDER, conditions, interleaved, measure_rounds, medians, table
from cli.client import DarkroomClient
from cli.server import SHIPPED_MODELS
from cli.stack import Stack, StackConfig
from contract.settings import Settings
from contract.spec import Task
from models.tasks import PictureRequest
from worker.build import build
from worker.engine import numerics
from worker.main import load

NAME: Final = "bench-latency"
WEIGHTS: Final = FOLDER.parent / "weights"
MODEL: Final = "darkroom-small"
PROMPT, SIDE, STEPS, GUIDANCE, THREADS = "a pizza on a blue background", 128, 20, 4.0, 2

Draw = Callable[[int], object]
"""Makes the picture of a seed."""


def with_diffusers(folder: Path) -> Draw:
    pipelines: Any = importlib.import_module("diffusers")
    pipeline = pipelines.StableDiffusionInpaintPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
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


def with_engine(folder: Path) -> Draw:
    """As a worker with the default settings runs it."""
    engine, _ = build(Settings(), [load(folder)], folder.parent, torch.device("cpu"))

    def draw(seed: int) -> object:
        request = PictureRequest("txt2img", PROMPT, SIDE, SIDE, seed=seed, steps=STEPS, guidance_scale=GUIDANCE)
        engine.submit(f"row-{seed}", folder.name, request)
        events = []
        while not engine.idle:
            events += engine.tick()
        return events

    return draw


def over_http(client: DarkroomClient) -> Draw:
    def draw(seed: int) -> object:
        fields = {"model": MODEL, "prompt": PROMPT, "steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
        job = client.submit(Task.TXT2IMG, fields)
        for _ in client.follow(job):
            pass
        return client.download(client.result(job).images[0])

    return draw


def first_picture(stack: Stack, begun: float) -> float:
    """Seconds from `begun`, when the stack was told to start, to its first picture."""
    with DarkroomClient(stack.url) as client:
        over_http(client)(0)
    return time.perf_counter() - begun


def measure(rounds: int) -> dict[str, Any]:
    numerics.pin(THREADS)
    with tempfile.TemporaryDirectory(prefix="darkroom-") as data:
        begun = time.perf_counter()
        settings = {"DARKROOM_WORKER_THREADS": str(THREADS)}
        with Stack(StackConfig(Path(data), WEIGHTS, SHIPPED_MODELS, settings=settings)) as stack:
            first = first_picture(stack, begun)
            with DarkroomClient(stack.url) as client:
                folder = WEIGHTS / MODEL
                ways = {
                    "diffusers": with_diffusers(folder),
                    "engine": with_engine(folder),
                    "POST to file": over_http(client),
                }
                seconds = interleaved(ways, rounds)
    return {
        "conditions": conditions(model=MODEL, steps=STEPS, threads=THREADS, rounds=rounds),
        "seconds": seconds,
        "start to first picture": first,
    }


def as_table(figures: dict[str, Any]) -> str:
    middle = medians(figures["seconds"])
    rows = [(name, value, middle["diffusers"] / value) for name, value in middle.items()]
    rows_text = table(("one picture", "seconds (median)", "times as fast as diffusers"), rows)
    start = figures["start to first picture"]
    return f"{rows_text}\n\nFrom starting the whole stack to its first picture: {start:.1f} s."


def main(arguments: Sequence[str] | None = None) -> None:
    measure_rounds(NAME, __doc__, 9, measure, as_table, arguments)


if __name__ == "__main__":
    main()
