"""`darkroom models`: add models to this machine's, look into them, list and remove them."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cli import options
from cli.client import DarkroomClient
from cli.console import err, friendly_errors, out
from cli.registry import RegistryError, registered
from cli.registry import remove as remove_folder

app = typer.Typer(no_args_is_help=True, help="The models of this machine, and those of a server.")


@contextmanager
def _model_errors() -> Iterator[None]:
    """What can be wrong with a model as one message; also says what is needed where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        err.print("models cannot be read without torch: install the extra `darkroom\\[worker]`", style="red")
        raise typer.Exit(1)
    from models.config import UnsupportedStructure
    from models.weights_io.tensors import WeightsError

    with friendly_errors():
        try:
            yield
        except (RegistryError, UnsupportedStructure, WeightsError) as error:
            raise OSError(str(error)) from error


@app.command()
def add(
    path: Annotated[
        Path,
        typer.Argument(help="A diffusers folder, or a .safetensors or .ckpt file in the original layout.", exists=True),
    ],
    name: Annotated[str, typer.Option("--name", help="What requests will call it.")],
    tokenizer: options.Tokenizer = None,
    prediction_type: options.Prediction = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="Averaged weights or the last. \\[default: as the model's own scripts]"),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy a folder instead of referring to it.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Where a request has none.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0.0, max=100.0, help="Where a request has no scale.")
    ] = None,
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Make a model known to workers on this machine: darkroom worker --models NAME.

    A folder is left where it is. A single file is written as a folder, once; a .ckpt is read without running anything
    that it holds. The card that the gateway validates requests against is made with it.
    """
    with _model_errors():
        from cli.adding import add
        from cli.model_cards import Usual
        from models.weights_io.single_file import Told

        told = Told(tokenizer=tokenizer, prediction_type=prediction_type, ema=ema)
        if path.is_dir() and told != Told():
            raise typer.BadParameter("--tokenizer, --prediction-type and --ema are for single files; folders say these")
        added = add(path, name, model_dir, told, copy=copy, usual=Usual(steps, guidance))
    card = added.card
    size = f"{card.default_width}x{card.default_height}"
    out.print(f"{name}: {added.kind} {path}; {', '.join(card.tasks)} at {size}", markup=False, highlight=False)
    other = added.recognised.family.other if added.recognised else None
    if other is not None and prediction_type is None:
        err.print(
            f"taken to predict {added.recognised and added.recognised.family.prediction_type}: the file cannot tell. "
            f"{other.models} need --prediction-type {other.prediction_type}",
            style="yellow",
            markup=False,
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A model of this machine, a folder or a file.", metavar="NAME|PATH")],
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """What a model is and can do. Reads all names and shapes, and says what does not fit."""
    with _model_errors():
        from cli.adding import facts

        registered_as = model_dir / model
        found = facts(registered_as if (registered_as / "card.json").is_file() else Path(model))
    for name, value in found.items():
        out.print(f"{name + ':':18}{value}", markup=False, highlight=False, soft_wrap=True)


@app.command("list")
def list_models(
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
    server: Annotated[bool, typer.Option("--server", help="Those that the server at --url knows.")] = False,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.ApiKey = None,
) -> None:
    """Name, tasks and origin of each model in the model directory, or of a server's."""
    with friendly_errors():
        if server:
            with DarkroomClient(url, api_key) as client:
                _print_served(client.models())
            return
        try:
            entries = registered(model_dir)
        except RegistryError as error:
            raise OSError(str(error)) from error
    if not entries:
        err.print(f"{model_dir} holds no models: name another folder with --model-dir", markup=False, soft_wrap=True)
        return
    table = Table("model", "tasks", "description", "from")
    for card, source in entries:
        table.add_row(card.name, ", ".join(card.tasks), card.description, source)
    out.print(table)


def _print_served(models: list[dict[str, Any]]) -> None:
    table = Table("model", "tasks", "description", "knows")
    for model in models:
        table.add_row(model["id"], ", ".join(model["tasks"]), model.get("description", ""), _vocabulary(model))
    out.print(table)


def _vocabulary(model: dict[str, Any]) -> str:
    words = model.get("vocabulary") or {}
    known = [*words.get("objects", ()), *words.get("colours", ())]
    return ", ".join(known) if known else "anything"


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Take away what `darkroom models add` made. What it refers to stays; so does what was put beside it later."""
    with friendly_errors():
        try:
            left = remove_folder(model_dir, name)
        except RegistryError as error:
            raise OSError(str(error)) from error
    out.print(f"{name}: removed" + (f"; {', '.join(left)} stays in {model_dir / name}" if left else ""), markup=False)
