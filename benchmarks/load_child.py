"""`python -m benchmarks.load_child WAY FOLDER DTYPE`: loads a model once and makes one forward pass of its UNet.

Prints seconds of both and the process's largest memory in MiB, before and after, as JSON.
"""

import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

SIDE: Final = 16
"""Of the latents: small, so that reading the weights is not lost in computing with them."""


def peak() -> int:
    """MiB of memory, mapped files included, that the process has had at most."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def ours() -> Any:
    from models.latent_diffusion import LatentDiffusion  # noqa: PLC0415  # the other way must not pay for it

    def load(folder: Path, dtype: torch.dtype, x: Tensor, context: Tensor) -> Tensor:
        model = LatentDiffusion.load(folder, dtype)
        out: Tensor = model.unet(x, torch.tensor([7]), context)
        return out

    return load


def diffusers() -> Any:
    library: Any = importlib.import_module("diffusers")
    pipeline = library.StableDiffusionPipeline  # imports what it needs

    def load(folder: Path, dtype: torch.dtype, x: Tensor, context: Tensor) -> Tensor:
        unet = pipeline.from_pretrained(folder, dtype=dtype).unet
        out: Tensor = unet(x, torch.tensor([7]), context).sample
        return out

    return load


@torch.inference_mode()
def main(way: str, folder: str, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    load = {"ours": ours, "diffusers": diffusers}[way]()
    config = json.loads((Path(folder) / "unet" / "config.json").read_text())
    x = torch.zeros(1, config["in_channels"], SIDE, SIDE, dtype=dtype)
    context = torch.zeros(1, 77, config["cross_attention_dim"], dtype=dtype)
    before, begun = peak(), time.perf_counter()
    out = load(Path(folder), dtype, x, context)
    seconds = time.perf_counter() - begun
    assert out.isfinite().all()
    print(json.dumps({"seconds": seconds, "peak MiB": peak(), "imports MiB": before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
