"""The engine at the scale of Stable Diffusion 1.5, random weights, on this machine's GPU, and diffusers if installed.

`make gpu`. Without a GPU it runs at a small size on the CPU, which shows that the command works and nothing else.
"""

import argparse
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CLIPTextConfig, CLIPTokenizer

from benchmarks.report import FOLDER, conditions, interleaved, medians, publish, table
from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.tasks import PictureRequest
from models.text import TextEncoder
from models.unet import UNet
from training.tokenizer import build_tokenizer
from worker.engine.engine import Engine
from worker.engine.events import RowFinished
from worker.engine.numerics import pin
from worker.engine.resident import ResidentModel
from worker.engine.tuning import default_tuning, tune

NAME: Final = "gpu"
MODEL: Final = "random"
GUIDANCE: Final = 7.5


@dataclass(frozen=True)
class Scale:
    """`side` of the pictures in pixels; `rows`: batch sizes whose throughput is measured."""

    name: str
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    text: CLIPTextConfig
    side: int
    steps: int
    rows: tuple[int, ...]


def full() -> Scale:
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return Scale(
        "SD1.5", UNetConfig(cross_attention_dim=768), AutoencoderConfig(), text, side=512, steps=50, rows=(1, 4, 8)
    )


def small() -> Scale:
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    autoencoder = AutoencoderConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8)
    text = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return Scale("small", unet, autoencoder, text, side=64, steps=5, rows=(1, 2))


def random_model(scale: Scale, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """Made on the device, so that no copy of the weights is on the host."""
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    torch.manual_seed(0)
    with device:
        unet, autoencoder = UNet(scale.unet), Autoencoder(scale.autoencoder)
        text = TextEncoder.create(tokenizer, scale.text)
    model = LatentDiffusion(unet, autoencoder, text, NoiseSchedule(ScheduleConfig()))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def request(scale: Scale, seed: int) -> PictureRequest:
    return PictureRequest(
        "txt2img", "a pizza", scale.side, scale.side, seed=seed, steps=scale.steps, guidance_scale=GUIDANCE
    )


def with_engine(model: ResidentModel, scale: Scale, rows: int) -> Callable[[int], object]:
    """Makes `rows` pictures in one batch of that size."""
    engine = Engine({MODEL: model}, buckets=(rows,), batching="exact", capacity=rows)

    def draw(seed: int) -> object:
        for row in range(rows):
            engine.submit(f"{seed}-{row}", MODEL, request(scale, seed * rows + row))
        made = 0
        while not engine.idle:
            made += sum(isinstance(event, RowFinished) for event in engine.tick())
        if made != rows:
            raise RuntimeError(f"{made} of {rows} pictures were made")
        return made

    return draw


def with_diffusers(model: LatentDiffusion, scale: Scale, rows: int) -> Callable[[int], object]:
    """The same weights in its pipeline, eager, without previews or a progress bar."""
    diffusers: Any = importlib.import_module("diffusers")
    device, dtype = model.device, model.unet.conv_in.weight.dtype
    text = model.conditioner
    assert isinstance(text, TextEncoder)
    parts = {}
    for name, kind, part in (
        ("unet", "UNet2DConditionModel", model.unet),
        ("vae", "AutoencoderKL", model.autoencoder),
    ):
        with device:
            parts[name] = getattr(diffusers, kind).from_config(part.config.to_dict()).to(dtype)
        parts[name].load_state_dict(part.state_dict())
    pipeline = diffusers.StableDiffusionPipeline(
        **parts,
        text_encoder=text.transformer,
        tokenizer=text.tokenizer,
        scheduler=diffusers.DDIMScheduler.from_config(model.schedule.config.to_dict()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw(seed: int) -> object:
        return pipeline(
            prompt=["a pizza"] * rows,
            height=scale.side,
            width=scale.side,
            num_inference_steps=scale.steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed * rows + row) for row in range(rows)],
        )

    return draw


def measure(scale: Scale, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of a batch by its size: engine and diffusers take turns."""
    model = random_model(scale, device, dtype)
    tuning = default_tuning(device, "float32" if dtype == torch.float32 else "bfloat16")
    side = scale.side // scale.autoencoder.downsampling_factor
    tuned = ResidentModel(tune(model, tuning, (side, side)))
    ours = {f"engine {rows}": with_engine(tuned, scale, rows) for rows in scale.rows}
    theirs = {}
    if importlib.util.find_spec("diffusers"):
        theirs = {f"diffusers {rows}": with_diffusers(model, scale, rows) for rows in scale.rows}
    begun = time.perf_counter()
    seconds = interleaved(ours | theirs, rounds)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    held = conditions(scale=scale.name, steps=scale.steps, side=scale.side, dtype=str(dtype), batching="exact")
    return {
        "conditions": held,
        "seconds": seconds,
        "peak GiB": memory,
        "seconds in all": time.perf_counter() - begun,
    }


def as_table(figures: dict[str, Any]) -> str:
    middle = medians(figures["seconds"])
    rows = []
    for name, seconds in middle.items():
        kind, _, size = name.partition(" ")
        beside = middle.get(f"diffusers {size}")
        rows.append((kind, size, seconds, int(size) / seconds, beside / seconds if beside else "not installed"))
    text = table(("who", "pictures at once", "seconds", "pictures per second", "times diffusers"), rows)
    return f"{text}\n\nPeak memory {figures['peak GiB']:.1f} GiB."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    pin()
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    figures = measure(full() if cuda else small(), device, dtype, options.rounds)
    publish(NAME, figures, as_table(figures), options.out)


if __name__ == "__main__":
    main()
