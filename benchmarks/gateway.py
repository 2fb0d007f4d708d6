"""Accepted requests per second of one gateway process, beside the bare framework without a queue: `make bench-gateway`.

POST /v1/txt2img over keep-alive connections on loopback, each of which sends its next request when the last one has
been answered. Valkey writes its append-only file; no worker runs, and the queue is emptied between rounds. Rounds are
interleaved, figures are medians. Every request has another prompt and seed; whatever is not answered with 202 is an
error. The client, the gateway and Valkey share the machine, so the processor time of each request is told as well: it
is what a core of its own would give.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import uvloop

from benchmarks.gateway_bare import ALL_PARAMETERS, BODY_ALONE
from benchmarks.http_load import as_fast_as_answered, post_bytes
from benchmarks.latency import MODEL, WEIGHTS
from benchmarks.processes import cpu_seconds
from benchmarks.report import FOLDER, conditions, publish, table
from broker import catalogue
from broker.connection import connect
from broker.embedded import EmbeddedValkey, free_port
from contract.card import ModelCard

NAME: Final = "bench-gateway"
GATEWAY: Final = "gateway"
WAYS: Final = {  # what is measured: its process and its address
    GATEWAY: ("gateway", "/v1/txt2img"),
    "bare framework, same parameters": ("bare", ALL_PARAMETERS),
    "bare framework, body alone": ("bare", BODY_ALONE),
}
_START_SECONDS: Final = 60.0
_NO_LIMITS: Final = {
    "DARKROOM_RATE_PER_SECOND": "1e6",
    "DARKROOM_RATE_BURST": "1000000",
    "DARKROOM_MAX_QUEUE_DEPTH": "1000000",
    "DARKROOM_MAX_WAITING_PER_KEY": "1000000",
}


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server as a process of its own, from when it takes connections."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/openapi.json")
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait()


def measure(rounds: int, requests: int, connections: int) -> dict[str, Any]:
    card = ModelCard.model_validate_json((WEIGHTS / MODEL / "card.json").read_bytes())
    figures: dict[str, dict[str, list[float]]] = {
        way: {"per second": [], "cpu us": [], "p50 ms": [], "p99 ms": []} for way in WAYS
    }
    with tempfile.TemporaryDirectory(prefix="darkroom-") as data, ExitStack() as stack:
        folder, ports = Path(data), {"gateway": free_port(), "bare": free_port()}
        valkey = stack.enter_context(EmbeddedValkey(folder / "valkey"))
        settings = _NO_LIMITS | {"DARKROOM_REDIS_URL": valkey.url, "DARKROOM_STORE_URL": f"file:{folder / 'store'}"}
        gateway = serving(
            ["cli.main", "gateway"], ports["gateway"], folder / "gateway.log",
            DARKROOM_PORT=str(ports["gateway"]), **settings,
        )  # fmt: skip
        bare = ["benchmarks.gateway_bare", "--port", str(ports["bare"]), "--card", card.model_dump_json()]
        processes = {
            "gateway": stack.enter_context(gateway),
            "bare": stack.enter_context(serving(bare, ports["bare"], folder / "bare.log")),
        }
        redis = stack.enter_context(connect(valkey.url))
        for number in range(rounds + 1):
            for way, (process, path) in WAYS.items():
                redis.flushall()
                catalogue.publish_cards(redis, [card])
                url, pid = f"http://127.0.0.1:{ports[process]}", processes[process].pid
                once = _round(url, path, pid, requests, connections)
                if number:  # the first one warms up
                    for name, value in once.items():
                        figures[way][name].append(value)
    held = conditions(rounds=rounds, requests=requests, connections=connections, cores=os.cpu_count())
    return {"conditions": held, "ways": figures}


def _round(url: str, path: str, pid: int, requests: int, connections: int) -> dict[str, float]:
    def request(index: int) -> bytes:
        fields = {"model": MODEL, "prompt": f"a pizza on a blue background, number {index}", "seed": index, "steps": 20}
        return post_bytes(url, path, fields)

    before = cpu_seconds(pid)
    seconds, answers = uvloop.run(as_fast_as_answered(url, connections, requests, request))
    used = cpu_seconds(pid) - before
    wrong = [answer for answer in answers if answer.status != 202]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {requests} requests were not accepted: {wrong[0].body!r}")
    latencies = statistics.quantiles([answer.seconds * 1000 for answer in answers], n=100)
    return {
        "per second": requests / seconds,
        "cpu us": 1e6 * used / requests,
        "p50 ms": latencies[49],
        "p99 ms": latencies[98],
    }


def as_table(figures: Mapping[str, Any]) -> str:
    ways = {way: {name: statistics.median(runs) for name, runs in of.items()} for way, of in figures["ways"].items()}
    rows = [
        (way, f"{one['per second']:.0f}", ways[GATEWAY]["per second"] / one["per second"], f"{one['cpu us']:.0f}",
         one["p50 ms"], one["p99 ms"])
        for way, one in ways.items()
    ]  # fmt: skip
    header = ("one process", "requests per second", "the gateway against it", "processor µs per request",
              "p50 in ms", "p99 in ms")  # fmt: skip
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=5000, help="of one round")
    parser.add_argument("--connections", type=int, default=48)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    figures = measure(options.rounds, options.requests, options.connections)
    publish(NAME, figures, as_table(figures), options.out)


if __name__ == "__main__":
    main()
