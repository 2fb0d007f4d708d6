"""From files on disk to the first forward pass of the UNet, at the scale of Stable Diffusion 1.5: seconds and memory.

`make bench-load`. Random weights in a temporary folder (6.5 GB), each measurement in a fresh process, ours and
diffusers' `from_pretrained` in turn; the files are in the page cache. Figures are medians.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu import Scale, full, random_model, small
from benchmarks.report import FOLDER, conditions, publish, table
from models.weights_io.folder import save_folder

NAME: Final = "bench-load"
WAYS: Final = ("ours", "diffusers")
CASES: Final = (("float32", "float32"), ("float16", "float32"), ("float16", "bfloat16"))
"""Numbers on disk and in memory."""
FREE_BYTES: Final = 10 * 2**30


def write(scale: Scale, folder: Path) -> dict[str, int]:
    """One model folder per type on disk, with its weights' MiB."""
    model = random_model(scale, torch.device("cpu"), torch.float32)
    sizes = {}
    for name in sorted({on_disk for on_disk, _ in CASES}):
        save_folder(model, folder / name, dtype=getattr(torch, name))
        sizes[name] = sum(path.stat().st_size for path in (folder / name).rglob("*.safetensors")) // 2**20
    return sizes


def once(way: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load_child", way, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(scale: Scale, rounds: int) -> dict[str, Any]:
    """Round 0 fills the page cache and is not counted."""
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="darkroom-load-") as name:
        free = shutil.disk_usage(name).free
        if scale.name == full().name and free < FREE_BYTES:
            raise SystemExit(f"{name}: {free / 2**30:.0f} GiB free, expected {FREE_BYTES / 2**30:.0f}; set TMPDIR")
        sizes = write(scale, Path(name))
        for number in range(rounds + 1):
            for on_disk, dtype in CASES:
                for way in WAYS:
                    one = once(way, Path(name) / on_disk, dtype)
                    if number:
                        found.setdefault(f"{way}, {on_disk} to {dtype}", []).append(one)
    return {"conditions": conditions(model=scale.name, rounds=rounds), "weights MiB": sizes, "runs": found}


def as_table(figures: dict[str, Any]) -> str:
    def middle(key: str, figure: str) -> float:
        return float(statistics.median(run[figure] for run in figures["runs"][key]))

    rows = []
    for on_disk, dtype in CASES:
        for way in WAYS:
            key = f"{way}, {on_disk} to {dtype}"
            memory = middle(key, "peak MiB")
            size = figures["weights MiB"][on_disk] * (2 if (on_disk, dtype) == ("float16", "float32") else 1)
            rows.append((way, on_disk, dtype, middle(key, "seconds"), f"{memory:.0f}", f"{size}",
                         f"{middle(key, 'imports MiB'):.0f}"))  # fmt: skip
    header = ("way", "on disk", "in memory", "seconds", "peak MiB", "weights, MiB in memory", "imports alone, MiB")
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a small model, to see that it works")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    figures = measure(small() if options.small else full(), options.rounds)
    publish(NAME, figures, as_table(figures), options.out)


if __name__ == "__main__":
    main()
