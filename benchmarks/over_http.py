"""The whole service over HTTP beside its engine in this process, and how soon a killed worker's job goes on.

`make bench-http`. 128x128, 20 guided steps, the model on two threads; the rounds are interleaved, figures are medians.
Saturation: so many pictures at once, each a job of its own, from the first POST until the last one is stored; for the
engine until the last one is decoded. Latency: one picture on an idle service.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import httpx
import torch

from benchmarks.latency import GUIDANCE, MODEL, PROMPT, SIDE, STEPS, THREADS, WEIGHTS
from benchmarks.recovery import recovery_seconds
from benchmarks.report import FOLDER, conditions, interleaved, medians, publish, table
from cli.stack import Stack, StackConfig
from contract.settings import Settings
from models.tasks import PictureRequest
from worker.build import build
from worker.engine import numerics
from worker.engine.engine import Engine
from worker.engine.events import RowFinished
from worker.main import load

NAME: Final = "bench-http"
_WAIT_SECONDS: Final = 60

Draw = Callable[[int], object]
"""Makes pictures; the seed is that of the round."""


def as_in_a_worker(folder: Path) -> Engine:
    """The engine that a worker with the default settings builds."""
    engine, _ = build(Settings(), [load(folder)], folder.parent, torch.device("cpu"))
    return engine


def by_engine(engine: Engine, pictures: int) -> Draw:
    """Without network, encoding and store."""

    def draw(seed: int) -> int:
        waiting = [
            PictureRequest("txt2img", PROMPT, SIDE, SIDE, seed=1000 * seed + i, steps=STEPS, guidance_scale=GUIDANCE)
            for i in range(pictures)
        ]
        finished = 0
        while finished < pictures:
            while waiting and engine.free_slots > 0:
                engine.submit(f"row-{len(waiting)}", MODEL, waiting.pop())
            finished += sum(isinstance(event, RowFinished) for event in engine.tick())
        return finished

    return draw


class Service:
    """A client that keeps its connections: making them is not what is measured. Use as a context manager."""

    def __init__(self, url: str, connections: int) -> None:
        self._runner = asyncio.Runner()
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.AsyncClient(base_url=url, timeout=2 * _WAIT_SECONDS, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def draw(self, pictures: int) -> Draw:
        async def draw_all(seed: int) -> None:
            await asyncio.gather(*(self._post(1000 * seed + i) for i in range(pictures)))

        return lambda seed: self._runner.run(draw_all(seed))

    async def _post(self, seed: int) -> None:
        fields = {"model": MODEL, "prompt": PROMPT, "steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
        answer = await self._client.post("/v1/txt2img", json=fields, headers={"Prefer": f"wait={_WAIT_SECONDS}"})
        if answer.status_code != 200:
            raise RuntimeError(f"no picture within {_WAIT_SECONDS} s: {answer.status_code} {answer.text}")


def measure(rounds: int, pictures: int, kills: int) -> dict[str, Any]:
    numerics.pin(THREADS)
    engine = as_in_a_worker(WEIGHTS / MODEL)
    settings = {"DARKROOM_WORKER_THREADS": str(THREADS)}
    with tempfile.TemporaryDirectory(prefix="darkroom-") as data:
        config = StackConfig(Path(data) / "stack", WEIGHTS, (MODEL,), settings=settings)
        with Stack(config) as stack, Service(stack.url, pictures) as service:
            seconds = {
                name: interleaved({"service": service.draw(count), "engine": by_engine(engine, count)}, times)
                for name, count, times in (("saturation", pictures, rounds), ("latency", 1, 3 * rounds))
            }
        recovery = asyncio.run(recovery_seconds(Path(data), kills))
    return {
        "conditions": conditions(model=MODEL, steps=STEPS, threads=THREADS, rounds=rounds, pictures=pictures),
        "seconds": seconds,
        "recovery": recovery,
    }


def as_table(figures: dict[str, Any]) -> str:
    pictures = figures["conditions"]["pictures"]
    full, alone = (medians(figures["seconds"][which]) for which in ("saturation", "latency"))
    rows = [
        (f"pictures per second, {pictures} at once", *(pictures / full[way] for way in ("service", "engine")),
         f"{100 * (full['engine'] / full['service'] - 1):+.1f} %"),
        ("seconds, one picture", alone["service"], alone["engine"],
         f"{1000 * (alone['service'] - alone['engine']):+.0f} ms"),
    ]  # fmt: skip
    speed = table(("", "service over HTTP", "engine in process", "difference"), rows)
    middle = medians(figures["recovery"])
    worst = {name: max(values) for name, values in figures["recovery"].items()}
    killed = table(
        ("after kill -9 of a worker, until its job", "seconds (median)", "longest"),
        [(name, middle[name], worst[name]) for name in middle],
    )
    return f"{speed}\n\n{killed}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of saturation; three times as many of single pictures")
    parser.add_argument("--pictures", type=int, default=24, help="at once, for saturation")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets results/ and RESULTS.md")
    options = parser.parse_args(arguments)
    figures = measure(options.rounds, options.pictures, options.kills)
    publish(NAME, figures, as_table(figures), options.out)


if __name__ == "__main__":
    main()
