"""`darkroom up`, `gateway`, `worker`: the programs that serve."""

import importlib.util
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.console import err, out, read_settings
from cli.stack import Stack, StackConfig, StackError, stop_signals_raise

SHIPPED_MODELS = ("darkroom-small", "darkroom-small-x4")
DEFAULT_MODELS = ",".join(SHIPPED_MODELS)
WATCH_SECONDS = 0.5

Models = Annotated[str, typer.Option("--models", help="Models to serve, comma-separated.")]


def names(models: str) -> list[str]:
    return [name.strip() for name in models.split(",") if name.strip()]


def model_names(models: str) -> list[str]:
    """Raises `typer.BadParameter` where there is none."""
    found = names(models)
    if not found:
        raise typer.BadParameter(f"{models!r}: expected names, comma-separated", param_hint="--models")
    return found


def up(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Keeps queue, pictures and logs.")] = Path(".darkroom"),
    models: Models = DEFAULT_MODELS,
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Start everything on this machine: an embedded Valkey, a gateway and a worker. Ctrl-C stops it all.

    Listens on 127.0.0.1 only. Jobs and pictures are kept in --data-dir.
    """
    started = time.monotonic()
    config = StackConfig(folder=data_dir, model_dir=model_dir, models=model_names(models), port=port)
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
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def examples(url: str) -> str:
    """Commands to paste into another terminal."""
    darkroom = "darkroom" if shutil.which("darkroom") else sys.argv[0]
    body = '\'{"prompt": "a pizza on a blue background", "seed": 7}\''
    return f"""
From another terminal:
  export DARKROOM_URL={url}
  {darkroom} txt2img "a pizza on a blue background" --seed 7 -o pizza.png
  curl -s {url}/v1/models
  curl -s -H 'Content-Type: application/json' -H 'Prefer: wait=60' -d {body} {url}/v1/txt2img
  curl -s -F image=@pizza.png -H 'Prefer: wait=60' {url}/v1/upscale
API reference: {url}/docs   Ctrl-C stops."""


def gateway() -> None:
    """Serve HTTP. Settings come from DARKROOM_... variables; needs Redis or Valkey and a picture store, never torch."""
    from service.main import main

    main(read_settings())


Devices = Annotated[
    str,
    typer.Option("--devices", help="cpu, or cuda:0,cuda:1 and so on: one process each. cpu,cpu makes two."),
]


def worker(
    models: Models = DEFAULT_MODELS,
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
    devices: Devices = "cpu",
) -> None:
    """Make the pictures: load models, take jobs from the queue, denoise many at once. Needs torch.

    Watches over one process per device: one that dies is started again, and its jobs go back to the queue at once.
    SIGTERM or Ctrl-C finishes what has begun; a second one hands it back at once.
    """
    from contract.log import configure_log
    from worker.supervisor import Supervisor, worker_command

    wrong = [device for device in names(devices) if not re.fullmatch(r"cpu|cuda:\d+", device)]
    if wrong or not names(devices):
        raise typer.BadParameter(f"{devices!r}: expected cpu or cuda:N, comma-separated", param_hint="--devices")
    if importlib.util.find_spec("torch") is None:
        err.print("a worker needs torch: install the extra `darkroom\\[worker]`", style="red")
        raise typer.Exit(1)
    settings = read_settings()
    configure_log(settings.log_format)
    if not Supervisor(settings, names(devices), worker_command(model_names(models), model_dir)).run():
        raise typer.Exit(1)
