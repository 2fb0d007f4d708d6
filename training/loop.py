"""One training loop for both stages: AdamW, EMA, warm-up, cosine decay; saved often, resumable to the same batches."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

LossFn = Callable[[nn.Module, int, torch.Generator], dict[str, Tensor]]
"""(module, step, generator of this step) -> named losses; "loss" is the one that is minimised."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """`decay_from`: share of the steps after which the learning rate falls to zero along a cosine."""

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 300
    decay_from: float = 0.5
    ema: float = 0.999
    seed: int = 0
    clip_norm: float = 1.0
    save_seconds: float = 120.0
    log_every: int = 50

    def learning_rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        start = self.decay_from * self.steps
        if step < start:
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * min((step - start) / max(self.steps - start, 1), 1.0)))


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer finite; nothing of that step reaches the weights or `state.pt`."""


class TrainingState:
    """Module, its moving average, optimiser and step, in one file per folder."""

    def __init__(self, module: nn.Module, settings: LoopSettings, folder: Path) -> None:
        self.module = module
        self.averaged = copy.deepcopy(module).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            module.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.step = 0
        self.path = folder / "state.pt"

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        state = {
            "module": self.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        torch.save(state, partial)
        partial.replace(self.path)

    def resume(self) -> bool:
        """Go on from the folder's file if there is one. Loads tensors only, never code."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        return True

    def update_average(self, decay: float) -> None:
        """Early steps average over fewer, so that the first weights are soon forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.averaged.parameters(), self.module.parameters(), strict=True)
            for average, parameter in pairs:
                average.lerp_(parameter, 1 - decay)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step depend on nothing but (seed, step), so a resumed run sees the same batches."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)  # torch reads 32 bits of a seed


def train(module: nn.Module, loss_fn: LossFn, settings: LoopSettings, folder: Path, title: str) -> nn.Module:
    """Run (or resume) to `settings.steps`; gives back the averaged module. `folder` gets `state.pt` and `log.csv`.

    Raises DivergedError; the last saved state stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainingState(module, settings, folder)
    state.resume()
    log = folder / "log.csv"
    _forget_after(log, state.step)
    saved = time.monotonic()
    means = _Means()
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[shown]}")) as progress:
        bar = progress.add_task(title, total=settings.steps, completed=state.step, shown="")
        while state.step < settings.steps:
            means.add(_optimise(state, loss_fn, settings))
            progress.update(bar, completed=state.step)
            if state.step % settings.log_every == 0:
                losses = means.take()
                _log(log, state.step, settings.learning_rate(state.step), losses)
                progress.update(bar, shown=" ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            if time.monotonic() - saved > settings.save_seconds:
                state.save()
                saved = time.monotonic()
    state.save()
    return state.averaged


def _optimise(state: TrainingState, loss_fn: LossFn, settings: LoopSettings) -> dict[str, float]:
    for group in state.optimiser.param_groups:
        group["lr"] = settings.learning_rate(state.step)
    losses = loss_fn(state.module, state.step, step_generator(settings.seed, state.step))
    values = {name: float(value.detach()) for name, value in losses.items()}
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    norm = float(nn.utils.clip_grad_norm_(state.module.parameters(), settings.clip_norm))
    if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
        raise DivergedError(
            f"{state.path.parent}: at step {state.step} the loss is {values['loss']}, its gradient's norm {norm}; both "
            "should be finite. Repeat the stage with a lower learning rate (lr): it goes on from the last saved step"
        )
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    state.step += 1
    state.update_average(settings.ema)
    return values


class _Means:
    """Means of named losses over the steps since they were last taken."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = 0

    def add(self, values: dict[str, float]) -> None:
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


def _forget_after(path: Path, step: int) -> None:
    """Drops what an interrupted run logged after the step from which this one goes on, so that steps occur once."""
    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    header, *rows = path.read_bytes().splitlines(keepends=True)
    kept = [row for row in rows if int(row.split(b",")[0]) <= step]
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join([header, *kept]))
    partial.replace(path)


def _log(path: Path, step: int, lr: float, means: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "unix_time", "lr", *means])
        writer.writerow([step, f"{time.time():.0f}", f"{lr:.6f}", *(f"{value:.6f}" for value in means.values())])
