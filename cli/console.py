"""What the person at the terminal sees: a progress bar per job, and errors without tracebacks."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cli.client import ApiError, DarkroomClient, Job, JobFailedError

out = Console()
err = Console(stderr=True)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turns what can go wrong with a server into one message and exit status 1."""
    try:
        yield
    except (ApiError, JobFailedError, OSError) as error:
        err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except httpx.TransportError as error:
        err.print(
            f"no server answered ({error}). Start one with `darkroom up`, or name one with --url or DARKROOM_URL.",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from error


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
