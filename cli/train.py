"""`darkroom train`: the shipped models' recipe, stage by stage, resumable. Needs the extra `train`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cli.console import err, friendly_errors, out

R = TypeVar("R")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Make the shipped models from nothing: about three hours on three CPU cores, minutes with --quick.

    [bold]In order:[/bold]  data, autoencoder, diffusion, upscaler; or all of them with  darkroom train all

    [bold]Interrupt[/bold] with Ctrl-C and repeat the command: a stage saves its state every two minutes, goes on from
    there to the same weights, and does nothing once it is done.

    [bold]Watch[/bold] with  darkroom train plot  and  darkroom train gate  while it runs;
    [bold]judge[/bold] with  darkroom train evaluate  afterwards.

    Data, states and logs lie in runs/, one folder a stage; finished models go to weights/. See docs/training.md.
    """,
)

Runs = Annotated[
    Path | None, typer.Option("--runs", help="Data, states and logs. \\[default: runs; runs/quick with --quick]")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Finished models. \\[default: weights; RUNS/weights with --quick]")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. \\[default: all cores]")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes that draw pictures.")]
Quick = Annotated[bool, typer.Option("--quick", help="Try every part in a few minutes; such models draw nothing yet.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=NUMBER", help="Change the recipe, e.g. pictures=1000 or diffusion.steps=500."),
]
DEFAULT_RUNS = Path("runs")
DEFAULT_WEIGHTS = Path("weights")


@app.command()
def data(
    runs: Runs = None,
    weights: Weights = None,
    processes: Processes = 1,
    quick: Quick = False,
    changes: Changes = None,
) -> None:
    """Draw captioned pictures, and build the tokenizer of their words: about a minute, 2.4 GB.

    Needs the emoji font; the error says how to install it.
    """
    run(["data"], runs, weights, processes=processes, quick=quick, changes=changes)


@app.command()
def autoencoder(
    runs: Runs = None, weights: Weights = None, threads: Threads = None, quick: Quick = False, changes: Changes = None
) -> None:
    """First stage, after data: the autoencoders, f = 8 for pictures and f = 4 for the upscaler. 40 minutes."""
    run(["autoencoder"], runs, weights, threads, quick=quick, changes=changes)


@app.command()
def diffusion(
    runs: Runs = None, weights: Weights = None, threads: Threads = None, quick: Quick = False, changes: Changes = None
) -> None:
    """Second stage, after autoencoder: the UNet and its text encoder; ends with darkroom-small. 75 minutes."""
    run(["diffusion"], runs, weights, threads, quick=quick, changes=changes)


@app.command()
def upscaler(
    runs: Runs = None, weights: Weights = None, threads: Threads = None, quick: Quick = False, changes: Changes = None
) -> None:
    """The upscaler's second stage, after autoencoder; ends with darkroom-small-x4."""
    run(["upscaler"], runs, weights, threads, quick=quick, changes=changes)


@app.command("all")
def every_stage(
    runs: Runs = None,
    weights: Weights = None,
    threads: Threads = None,
    processes: Processes = 1,
    quick: Quick = False,
    changes: Changes = None,
) -> None:
    """All four stages in order: hours on a CPU."""
    run(["data", "autoencoder", "diffusion", "upscaler"], runs, weights, threads, processes, quick, changes)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Score the models on prompts, inpainting and upscaling, as `make score` does. Takes its options: see --help."""
    from benchmarks.score import main

    main(context.args)


@app.command()
def plot(
    runs: Annotated[Path, typer.Option("--runs", help="Where the logs are.")] = DEFAULT_RUNS,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG. \\[default: losses.png in RUNS]")] = None,
) -> None:
    """Draw every stage's losses over its steps. Each stage does so when it ends."""
    from training.plot import plot_losses

    try:
        out.print(str(plot_losses(runs, output or runs / "losses.png")), markup=False, soft_wrap=True)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def gate(
    runs: Annotated[Path, typer.Option("--runs", help="Where diffusion trains.")] = DEFAULT_RUNS,
    pictures: Annotated[int, typer.Option("--pictures", min=2, help="Captions to swap.")] = 256,
) -> None:
    """Ask the state last saved whether it listens to the object word; ends with status 1 if not.

    Compares the loss at a noisy timestep under the right captions with the loss under captions whose object was
    swapped. No gap after 50,000 samples (step 800 of the recipe) means: stop, and repair what feeds text to the UNet.
    """
    from training.gate import TIMESTEP, gate_of_runs

    with friendly_errors():
        result = gate_of_runs(runs, pictures)
    numbers = f"right captions {result.right:.4f}, object swapped {result.swapped:.4f}"
    gap = f"gap {result.gap:+.4f} ± {result.error:.4f}"
    out.print(f"step {result.step}, t = {TIMESTEP}, {result.pictures} pictures: {numbers}, {gap}", soft_wrap=True)
    out.print("it listens to the object word" if result.listens else "it does not listen to the object word (yet)")
    if not result.listens:
        raise typer.Exit(1)


def run(
    names: Sequence[str],
    runs: Path | None,
    weights: Path | None,
    threads: int | None = None,
    processes: int = 1,
    quick: bool = False,
    changes: Sequence[str] | None = None,
) -> None:
    """The stages with these names, each followed by a fresh plot of the losses."""
    import torch

    from training.loop import DivergedError
    from training.plot import plot_losses
    from training.recipe import QUICK, Recipe, Workshop

    recipe = QUICK if quick else Recipe()
    for change in changes or ():
        recipe = changed(recipe, change)
    runs = runs or (DEFAULT_RUNS / "quick" if quick else DEFAULT_RUNS)
    weights = weights or (runs / "weights" if quick else DEFAULT_WEIGHTS)
    if threads is not None:
        torch.set_num_threads(threads)
    stages = Workshop(runs, weights, recipe, processes).stages
    with friendly_errors():
        try:
            for name in names:
                out.rule(name)
                stages[name]()
                if name != "data":
                    out.print(f"losses: {plot_losses(runs, runs / 'losses.png')}", markup=False, soft_wrap=True)
        except (DivergedError, ValueError) as error:
            err.print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error


def changed(recipe: R, change: str) -> R:
    """The dataclass with one number changed: `pictures=1000`, `diffusion.steps=500`."""
    path, _, text = change.partition("=")
    name, _, rest = path.partition(".")
    fields = {field.name for field in dataclasses.fields(recipe)}  # type: ignore[arg-type]
    if name not in fields:
        raise typer.BadParameter(f"{name!r} is not in the recipe; expected one of {', '.join(sorted(fields))}")
    value = getattr(recipe, name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(recipe, **{name: changed(value, f"{rest}={text}")})  # type: ignore[type-var]
    number = float if value is None else type(value)  # None: an option that is off
    try:
        return dataclasses.replace(recipe, **{name: number(text)})  # type: ignore[type-var]
    except ValueError as error:
        expected = "a number" if value is None else f"a number like {value!r}"
        raise typer.BadParameter(f"{change!r}: expected NAME=NUMBER, {expected}") from error
