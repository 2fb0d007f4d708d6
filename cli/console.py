"""What the person at the terminal sees: a progress bar per job, and errors without tracebacks."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cli.client import ApiError, DarkroomClient, Job, JobFailedError
from contract.settings import Settings

out = Console()
err = Console(stderr=True)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turns what can go wrong with a server into one message and exit status 1."""
    try:
        yield
    except (ApiError, JobFailedError, OSError) as error:
        err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, ApiError) and error.status == 401:
            err.print("The key is --api-key or DARKROOM_API_KEY.", style="red")
        raise typer.Exit(1) from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        err.print(
            f"no server answered{_place(error)} ({error}). Start one with `darkroom up`, or name one with --url or "
            "DARKROOM_URL, e.g. http://127.0.0.1:8000",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from error


def _place(error: Exception) -> str:
    """Where the server should have been."""
    try:
        url = error.request.url if isinstance(error, httpx.ConnectError) else None
    except RuntimeError:  # the error knows no request
        url = None
    return f" at {url.scheme}://{url.netloc.decode()}" if url else ""


def read_settings() -> Settings:
    """Those of the environment. A wrong one becomes a line with its name and exit status 2; its value is not shown,
    since it may be a secret."""
    try:
        return Settings()
    except ValidationError as error:
        for entry in error.errors(include_url=False, include_context=False, include_input=False):
            name = "".join(f"DARKROOM_{part}".upper() for part in entry["loc"][:1])
            message = entry["msg"].removeprefix("Value error, ")
            err.print(f"{name}: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def finish_with_bar(client: DarkroomClient, job: Job, label: str) -> Job:
    """Shows the job's progress until it has ended; returns the ended job. Raises `JobFailedError`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task(label, total=None, note=job.status.value)
        for update in client.follow(job):
            waiting = f" (position {update.queue_position})" if update.queue_position else ""
            progress.update(bar, note=f"{update.status.value}{waiting}")
            if update.steps:
                progress.update(bar, completed=update.step, total=update.steps)
        ended = client.result(job)
        total = progress.tasks[0].total or 1
        progress.update(bar, completed=total, total=total, note="done")
    for warning in ended.warnings:
        err.print(f"warning: {warning.message}", style="yellow", markup=False)
    return ended
