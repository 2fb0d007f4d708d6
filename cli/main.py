"""The `darkroom` command: the programs of the service, and a client for them."""

import typer

from cli import bench, generate, jobs, keys, models, server, train
from cli.demo import demo
from cli.loras import add_lora
from cli.render import render

app = typer.Typer(
    name="darkroom",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a plain traceback reads better in a log
    help="""Darkroom makes pictures: latent diffusion behind HTTP, on resident workers.

    [bold]Try it:[/bold]  darkroom demo

    [bold]Serve:[/bold]  darkroom up  starts everything on this machine;
    darkroom gateway  and  darkroom worker  are the parts, for several machines.

    [bold]Use a server:[/bold]  darkroom txt2img "a pizza on a blue background" --seed 7 -o pizza.png

    The server is --url or DARKROOM_URL, the key --api-key or DARKROOM_API_KEY.
    """,
)

_PICTURES = "Make pictures"
_SERVERS = "Run servers"
for command in (generate.txt2img, generate.img2img, generate.inpaint, generate.upscale):
    app.command(rich_help_panel=_PICTURES)(command)
app.add_typer(jobs.app, name="jobs", rich_help_panel=_PICTURES)
models.app.command()(add_lora)
app.add_typer(models.app, name="models", rich_help_panel=_SERVERS)
app.command(rich_help_panel=_PICTURES)(render)
app.command(rich_help_panel=_SERVERS)(demo)
for command in (server.up, server.gateway, server.worker):
    app.command(rich_help_panel=_SERVERS)(command)
app.add_typer(keys.app, name="keys", rich_help_panel=_SERVERS)
app.add_typer(bench.app, name="bench", rich_help_panel=_SERVERS)
app.add_typer(train.app, name="train", rich_help_panel="Train models")

if __name__ == "__main__":
    app()
