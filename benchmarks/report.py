"""What every benchmark shares: interleaved timing, the conditions of a measurement, and where its results go.

Each command owns one section of benchmarks/RESULTS.md and one file in benchmarks/results/.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

FOLDER: Final = Path(__file__).resolve().parent


def interleaved(ways: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round: all ways take turns, so that a busy moment hits them alike.

    Every call gets a seed of its own round; round 0 warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(rounds + 1):
        for name, run in ways.items():
            begun = time.perf_counter()
            run(seed)
            if seed:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def conditions(**more: object) -> dict[str, object]:
    """Machine, versions and commit; `more` is what else the figures depend on, threads for one."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        **more,
    }


def cpu_name() -> str:
    """As the kernel tells it, where it does."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def commit() -> str:
    """Of this tree, with "+" after it where files have changed since; "unknown" outside a repository."""
    try:
        command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty=+", "--abbrev=10", "--match="]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; floats to three significant digits."""
    lines = [list(header), ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def publish(name: str, figures: Mapping[str, Any], text: str, folder: Path = FOLDER) -> None:
    """Writes results/`name`.json and the section "make `name`" of RESULTS.md, and prints the text.

    `figures["conditions"]`, as `conditions` gives them, are shown above the text.
    """
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    held = ", ".join(f"{key} {value}" for key, value in figures["conditions"].items())
    path = folder / "RESULTS.md"
    page = path.read_text() if path.exists() else "# Results\n\nWritten by the commands that the sections name.\n"
    path.write_text(with_section(page, f"make {name}", f"{held}\n\n{text}"))
    print(text)


def with_section(page: str, title: str, body: str) -> str:
    """The Markdown page with its section "## `title`" replaced, or added at the end."""
    section = f"## {title}\n\n{body.strip()}\n"
    parts = re.split(r"(?m)^(?=## )", page)
    kept = [section if part.startswith(f"## {title}\n") else part for part in parts]
    if section not in kept:
        kept.append(section)
    return "\n".join(part.rstrip("\n") + "\n" for part in kept)


def measure_rounds(
    name: str,
    description: str | None,
    rounds: int,
    measure: Callable[[int], dict[str, Any]],
    as_table: Callable[[dict[str, Any]], str],
    arguments: Sequence[str] | None,
) -> None:
    """The whole command of a benchmark whose figures come of a number of rounds, `rounds` unless `arguments` say so."""
    parser = argparse.ArgumentParser(prog=name, description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    figures = measure(options.rounds)
    publish(name, figures, as_table(figures), options.out)
