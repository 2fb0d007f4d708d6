"""What the OpenAPI document allows and forbids, and hostile pictures, sent to a service: no 5xx, no dead worker.

`make fuzz`. Valkey, a gateway with an API key, a worker with tiny models. Every answer is held against the document,
every accepted job against its end; a fault ends the command with its text.
"""

import argparse
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.fuzz_document import EXCLUDED, Fuzzer, Outcome
from benchmarks.report import FOLDER, conditions, publish, table
from cli.stack import Stack, StackConfig
from contract.spec import Task
from tests.tiny_models import BASE, UPSCALER, save_tiny_models

NAME: Final = "fuzz"
_KEY: Final = "key-of-the-fuzzer-0123456789"
_SETTINGS: Final = {
    "API_KEYS": _KEY, "WORKER_THREADS": "1", "MAX_STEPS": "8", "MAX_PICTURES": "4", "MAX_WAIT_SECONDS": "1",
    "RATE_PER_SECOND": "1000000", "RATE_BURST": "1000000", "MAX_QUEUE_DEPTH": "100000", "MAX_WAITING_PER_KEY": "100000",
}  # fmt: skip
PARTS: Final = {"document": Fuzzer.by_document, "jobs": Fuzzer.by_jobs, "pictures": Fuzzer.by_pictures}
_FAILED_BY_REQUEST: Final = {"deadline_exceeded", "expired"}  # deadlines are fuzzed as well
_SERVER_ERROR: Final = re.compile(r'(?m)^darkroom_http_requests_total\{[^}]*status="5\d\d"[^}]*\} (\S+)$')


@dataclass(frozen=True)
class Plan:
    """`document`: cases per operation and phase, of all phases or without `edges`; `jobs` and `pictures`: requests per
    task. Of these at least `accepted` must become jobs."""

    document: int
    edges: bool
    jobs: int
    pictures: int
    accepted: int
    seed: int
    patience: float


@dataclass(frozen=True)
class Result:
    """Of everything that was sent, by part, and what became of the service."""

    parts: dict[str, Outcome]
    ends: Counter[str]
    server_errors: int
    worker_exits: int


def run(plan: Plan, folder: Path) -> Result:
    save_tiny_models(folder / "models")
    settings = {f"DARKROOM_{name}": value for name, value in _SETTINGS.items()}
    config = StackConfig(folder / "stack", folder / "models", (BASE, UPSCALER), settings=settings)
    with Stack(config) as stack:
        parts = {}
        for name, examples in (("document", plan.document), ("jobs", plan.jobs), ("pictures", plan.pictures)):
            fuzzer = Fuzzer(stack.url, _KEY, examples, plan.seed, plan.edges)
            PARTS[name](fuzzer)
            parts[name] = fuzzer.outcome
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {_KEY}"}, timeout=30) as client:
            ends = wait_for_ends(client, plan.patience)
            server_errors = int(sum(float(count) for count in _SERVER_ERROR.findall(client.get("/metrics").text)))
        stack.check()
        exits = stack.log_path("worker").read_text(errors="replace").count("worker ended")
    return Result(parts, ends, server_errors, exits)


def wait_for_ends(client: httpx.Client, patience: float) -> Counter[str]:
    """How many jobs ended how: "succeeded", "cancelled", or the code of what failed them; "lost" after `patience`
    seconds."""
    deadline = time.monotonic() + patience
    while True:
        found = Counter(_end(job) for job in _jobs(client))
        if not found["lost"] or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _end(job: dict[str, Any]) -> str:
    status = str(job["status"])
    if status == "failed":
        return str(job["error"]["code"])
    return status if status in ("succeeded", "cancelled") else "lost"


def _jobs(client: httpx.Client) -> Iterator[dict[str, Any]]:
    cursor: dict[str, str] = {}
    while True:
        page = client.get("/v1/jobs", params={"limit": "100", **cursor}).json()
        yield from page["data"]
        if page["next_cursor"] is None:
            return
        cursor = {"cursor": page["next_cursor"]}


def broken_promises(plan: Plan, result: Result) -> list[str]:
    """Empty when all is well."""
    found = [
        f"{part}: {place}\n{text}" for part, outcome in result.parts.items() for place, text in outcome.faults.items()
    ]
    seen = sum(outcome.server_errors() for outcome in result.parts.values())
    if seen or result.server_errors:
        found.append(f"{seen} answers of 5xx, {result.server_errors} by the gateway's own count; expected none")
    if result.worker_exits:
        found.append(f"{result.worker_exits} workers ended; expected none")
    for task in Task:
        accepted = sum(outcome.accepted(f"POST /v1/{task.value}") for outcome in result.parts.values())
        if accepted < plan.accepted:
            found.append(f"{accepted} jobs of {task.value}; expected at least {plan.accepted}")
    bad = set(+result.ends) - {"succeeded", "cancelled", *_FAILED_BY_REQUEST}
    if bad:
        found.append(f"jobs that ended by {', '.join(sorted(bad))}: {result.ends}")
    return found


def as_table(result: Result) -> str:
    operations = sorted({operation for outcome in result.parts.values() for operation, _ in outcome.cases})
    rows = []
    for operation in operations:
        of_parts = [
            sum(count for (name, _), count in outcome.cases.items() if name == operation)
            for outcome in result.parts.values()
        ]
        taken = sum(outcome.accepted(operation) for outcome in result.parts.values())
        rows.append((operation, *of_parts, taken))
    total = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    cases = table(
        ("cases", "from the document", "meant to be jobs", "hostile pictures", "of all, answered with 200 or 202"),
        [*rows, ("all", *total)],
    )
    ends = ", ".join(f"{count} {end}" for end, count in sorted(result.ends.items()) if count)
    left_out = "\n".join(f"- Left out, schemathesis' check `{name}`: {reason}." for name, reason in EXCLUDED.items())
    pictures = result.parts["pictures"].pictures.values()
    seen = f"{len(pictures)} different hostile pictures, {sum(pictures)} of them taken."
    told = f"{result.server_errors} answers of 5xx, {result.worker_exits} worker exits. Jobs that were kept: {ends}."
    return f"{cases}\n\n{seen} {told}\n\n{left_out}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--document", type=int, default=300, help="cases per operation and phase of schemathesis")
    parser.add_argument(
        "--edges",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="schemathesis' edges of every schema and chains of calls: thousands of cases, whatever --document says",
    )
    parser.add_argument("--jobs", type=int, default=150, help="requests per task that should become jobs")
    parser.add_argument("--pictures", type=int, default=1000, help="requests per task with a hostile picture")
    parser.add_argument("--accepted", type=int, default=50, help="jobs per task below which the command fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds after which a job counts as lost")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    plan = Plan(**options)
    with tempfile.TemporaryDirectory(prefix="darkroom-fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schemathesis' own libraries
        result = run(plan, Path(folder))
    text = as_table(result)
    if broken := broken_promises(plan, result):
        sys.exit("\n\n".join([text, *broken]))
    figures = {
        name: {f"{operation} {status}": count for (operation, status), count in sorted(outcome.cases.items())}
        for name, outcome in result.parts.items()
    }
    publish(NAME, {"conditions": conditions(**asdict(plan)), "cases": figures, "ends": result.ends}, text, out)


if __name__ == "__main__":
    main()
