"""`darkroom up`, `gateway`, `worker`: the programs that serve."""

import time
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import err, out
from cli.stack import Stack, StackConfig, StackError, stop_signals_raise

SHIPPED_MODELS = ("darkroom-small", "darkroom-small-x4")
DEFAULT_MODELS = ",".join(SHIPPED_MODELS)
WATCH_SECONDS = 0.5

Models = Annotated[str, typer.Option("--models", help="Models to serve, comma-separated.")]


def names(models: str) -> list[str]:
    return [name.strip() for name in models.split(",") if name.strip()]


def up(
    port: Annotated[int, typer.Option("--port", help="Port of the gateway; 0 takes a free one.")] = 0,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Keeps queue, pictures and logs.")] = Path(".darkroom"),
    models: Models = DEFAULT_MODELS,
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Start everything on this machine: an embedded Valkey, a gateway and a worker. Ctrl-C stops it all.

    Listens on 127.0.0.1 only. Jobs and pictures are kept in --data-dir.
    """
    started = time.monotonic()
    config = StackConfig(folder=data_dir, model_dir=model_dir, models=names(models), port=port)
    try:
        with stop_signals_raise(), Stack(config) as stack:
            seconds = time.monotonic() - started
            out.print(f"[bold green]ready[/bold green] after {seconds:.1f} s at [bold]{stack.url}[/bold]")
            out.print(examples(stack.url), markup=False, highlight=False, soft_wrap=True)
            while True:
                stack.check()
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        out.print("stopped")
    except (StackError, OSError) as error:
        err.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error


def examples(url: str) -> str:
    """Commands to paste into another terminal."""
    body = '\'{"prompt": "a pizza on a blue background", "seed": 7}\''
    return f"""
From another terminal:
  export DARKROOM_URL={url}
  darkroom txt2img "a pizza on a blue background" --seed 7 -o pizza.png
  curl -s {url}/v1/models
  curl -s -H 'Content-Type: application/json' -H 'Prefer: wait=60' -d {body} {url}/v1/txt2img
  curl -s -F image=@pizza.png -H 'Prefer: wait=60' {url}/v1/upscale
API reference: {url}/docs   Ctrl-C stops."""


def gateway() -> None:
    """Serve HTTP. Settings come from DARKROOM_... variables; needs Redis or Valkey and a picture store, never torch."""
    from contract.settings import Settings
    from service.main import main

    main(Settings())


def worker(models: Models = DEFAULT_MODELS, model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR) -> None:
    """Make the pictures: load models, take jobs from the queue, denoise many at once. Needs torch."""
    from contract.settings import Settings
    from worker.main import ModelFolderError, main

    try:
        main(Settings(), models=names(models), model_dir=model_dir)
    except ModelFolderError as error:
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
