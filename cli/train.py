"""`darkroom train`: the shipped models' recipe, stage by stage, resumable. Needs the extra `train`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.console import out

if TYPE_CHECKING:
    from training.recipe import Workshop

R = TypeVar("R")

app = typer.Typer(
    no_args_is_help=True,
    help="""Make the shipped models from nothing. Every stage resumes where it stopped.

    In order: data, autoencoder, diffusion, upscaler; or all. Data, states and logs lie in runs/, one folder a stage.
    """,
)

Runs = Annotated[Path, typer.Option("--runs", help="Data, states and logs.")]
Weights = Annotated[Path, typer.Option("--weights", help="Where finished models go.")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes that draw pictures.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=NUMBER", help="Change the recipe, e.g. pictures=1000 or diffusion.steps=500."),
]
DEFAULT_RUNS = Path("runs")
DEFAULT_WEIGHTS = Path("weights")


@app.command()
def data(
    runs: Runs = DEFAULT_RUNS, weights: Weights = DEFAULT_WEIGHTS, processes: Processes = 1, changes: Changes = None
) -> None:
    """Draw captioned pictures, and build the tokenizer of their words."""
    workshop(runs, weights, processes, changes).data()


@app.command()
def autoencoder(runs: Runs = DEFAULT_RUNS, weights: Weights = DEFAULT_WEIGHTS, changes: Changes = None) -> None:
    """First stage: the autoencoders, f = 8 for pictures and f = 4 for the upscaler."""
    workshop(runs, weights, 1, changes).autoencoder()


@app.command()
def diffusion(runs: Runs = DEFAULT_RUNS, weights: Weights = DEFAULT_WEIGHTS, changes: Changes = None) -> None:
    """Second stage: the UNet and its text encoder, on latents; ends with darkroom-small."""
    workshop(runs, weights, 1, changes).diffusion()


@app.command()
def upscaler(runs: Runs = DEFAULT_RUNS, weights: Weights = DEFAULT_WEIGHTS, changes: Changes = None) -> None:
    """Second stage of the upscaler; ends with darkroom-small-x4."""
    workshop(runs, weights, 1, changes).upscaler()


@app.command("all")
def every_stage(
    runs: Runs = DEFAULT_RUNS, weights: Weights = DEFAULT_WEIGHTS, processes: Processes = 1, changes: Changes = None
) -> None:
    """All stages in order: hours on a CPU."""
    for name, stage in workshop(runs, weights, processes, changes).stages.items():
        out.rule(name)
        stage()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Score the models on prompts, inpainting and upscaling, as `make score` does. Takes its options: see --help."""
    from benchmarks.score import main

    main(context.args)


@app.command()
def plot(
    runs: Runs = DEFAULT_RUNS,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG. [default: losses.png in RUNS]")] = None,
) -> None:
    """Draw every stage's losses over its steps."""
    from cli.loss_plot import plot_losses

    try:
        out.print(str(plot_losses(runs, output or runs / "losses.png")), markup=False, soft_wrap=True)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error


def workshop(runs: Path, weights: Path, processes: int, changes: Sequence[str] | None) -> "Workshop":
    from training.recipe import Recipe, Workshop

    recipe = Recipe()
    for change in changes or ():
        recipe = changed(recipe, change)
    return Workshop(runs, weights, recipe, processes)


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
    try:
        return dataclasses.replace(recipe, **{name: type(value)(text)})  # type: ignore[type-var]
    except ValueError as error:
        raise typer.BadParameter(f"{change!r}: expected NAME=NUMBER, a number like {value!r}") from error
