"""`darkroom jobs`: what a server works on."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from cli import options
from cli.client import DarkroomClient, Job
from cli.console import friendly_errors, out
from contract.spec import JobStatus

app = typer.Typer(no_args_is_help=True, help="List, show, cancel and delete the jobs of your API key.")

_WHOLE = ("id", "task", "status", "age")
"""Columns that a narrow terminal leaves as they are."""

JobId = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]


@app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(help="Most jobs to show.", min=1, max=100)] = 20,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.ApiKey = None,
) -> None:
    """The newest jobs first."""
    with friendly_errors(), DarkroomClient(url, api_key) as client:
        page = client.jobs(status, limit)
    table = Table(*(Column(name, no_wrap=True) for name in _WHOLE), "model", "prompt", box=None, pad_edge=False)
    for job in (Job.model_validate(entry) for entry in page["data"]):
        prompt = " ".join(str(job.request.get("prompt", "")).split())
        cut = (Text(text, no_wrap=True, overflow="ellipsis") for text in (job.model, prompt))
        table.add_row(job.id, job.task.value, job.status.value, _age(job.created_at), *cut)
    out.print(table)


def _age(created_at: str) -> str:
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


@app.command()
def show(job: JobId, url: options.Url = options.DEFAULT_URL, api_key: options.ApiKey = None) -> None:
    """One job, as the server describes it (JSON)."""
    with friendly_errors(), DarkroomClient(url, api_key) as client:
        out.print_json(client.job(job).model_dump_json(exclude_none=True))


@app.command()
def cancel(job: JobId, url: options.Url = options.DEFAULT_URL, api_key: options.ApiKey = None) -> None:
    """Stop a job that waits or runs."""
    with friendly_errors(), DarkroomClient(url, api_key) as client:
        out.print(f"{job}: {client.cancel(job).status.value}", markup=False)


@app.command()
def delete(job: JobId, url: options.Url = options.DEFAULT_URL, api_key: options.ApiKey = None) -> None:
    """Remove an ended job and its pictures."""
    with friendly_errors(), DarkroomClient(url, api_key) as client:
        client.delete(job)
    out.print(f"{job}: deleted", markup=False)
