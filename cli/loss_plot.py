"""The logs of all training stages as one picture: a panel per stage, a curve per loss."""

import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_NOT_LOSSES = ("step", "unix_time", "lr")


def plot_losses(runs: Path, output: Path) -> Path:
    """Reads `runs`/*/log.csv, writes a PNG. Raises FileNotFoundError where nothing has been trained."""
    logs = sorted(runs.glob("*/log.csv"))
    if not logs:
        raise FileNotFoundError(f"{runs} has no */log.csv; train a stage first, e.g. `darkroom train autoencoder`")
    figure = Figure(figsize=(6 * len(logs), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for position, log in enumerate(logs, start=1):
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
        axes = figure.add_subplot(1, len(logs), position)
        steps = [int(row["step"]) for row in rows]
        for name in [name for name in rows[0] if name not in _NOT_LOSSES] if rows else []:
            axes.plot(steps, [float(row[name]) for row in rows], label=name)
        axes.set(title=log.parent.name, xlabel="step", yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(output)
    return output
