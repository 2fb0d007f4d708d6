"""The logs of all training stages as one picture: a panel per stage, a curve per loss."""

import csv
from pathlib import Path

from matplotlib.axes import Axes
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
        _draw(figure.add_subplot(1, len(logs), position), log.parent.name, read_log(log))
    figure.savefig(output)
    return output


def read_log(path: Path) -> dict[str, list[float]]:
    """Columns of a `log.csv` by name: step, unix_time (seconds), lr, and each loss, a mean since the row before."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}


def _draw(axes: Axes, stage: str, columns: dict[str, list[float]]) -> None:
    for name, values in columns.items():
        if name not in _NOT_LOSSES:
            axes.plot(columns["step"], values, label=f"{name} {values[-1]:.4f}")
    axes.set_title(stage)
    axes.set_xlabel("step")
    axes.set_yscale("log", nonpositive="mask")  # adversarial terms are zero until they join in
    axes.grid(visible=True, alpha=0.3)
    if columns:
        axes.legend()
