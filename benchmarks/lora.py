"""Milliseconds per denoising step of four pictures with four different adapters, beside the same without any.

`make bench-lora`. Two threads (a GPU where there is one); all ways take turns, figures are medians. Random adapters of
the usual kinds: on all attention projections, and on every linear and convolution of the transformers and res-blocks.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from benchmarks.engine import SHIPPED, THREADS, Case, random_model, shipped
from benchmarks.report import conditions, interleaved, measure_rounds, medians, table
from models.lora import Adapter, LowRank
from models.tasks import PictureRequest
from worker.engine import numerics, runner
from worker.engine.adapters import padded_rank
from worker.engine.bank import Bank
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey

NAME: Final = "bench-lora"
ROWS: Final = 4
GUIDANCE: Final = 4.0
ATTENTION: Final = r".*\.attn\d\.to_(q|k|v|out\.0)"
EVERYWHERE: Final = ATTENTION + r"|.*\.(proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut)"
KINDS: Final[Mapping[str, tuple[str, int]]] = {
    "attention, rank 8": (ATTENTION, 8),
    "attention, rank 32": (ATTENTION, 32),
    "everywhere, rank 8": (EVERYWHERE, 8),
}


def random_adapter(root: nn.Module, pattern: str, rank: int) -> Adapter:
    low_ranks = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name):
            shape = module.weight.shape
            down = torch.randn(rank, *shape[1:]) * shape[1:].numel() ** -0.5
            low_ranks[name] = LowRank(down, 0.1 * torch.randn(shape[0], rank), 1.0)
    return Adapter(low_ranks, {}, "random")


def step_of(resident: ResidentModel, one: Case, names: Sequence[str | None]) -> Callable[[int], None]:
    """One step of a row per name, each with the adapter of that name."""
    side = one.side * one.model.autoencoder.config.downsampling_factor
    requests = [
        PictureRequest(
            "txt2img", "a cat", side, side, seed, guidance_scale=GUIDANCE, loras=((name, 0.8),) if name else ()
        )
        for seed, name in enumerate(names)
    ]
    rank = max(padded_rank(resident.model.unet, resident.model.uses(request)) for request in requests)
    bank = Bank(resident, LaneKey(one.name, one.side, one.side, guided=True, rank=rank), len(requests))
    for slot, request in enumerate(requests):
        runner.admit(resident, bank, slot, request)

    def run(_: int) -> None:
        bank.step.zero_()
        runner.step(resident, bank, slice(0, len(requests)))

    return run


@torch.inference_mode()
def measure_case(one: Case, rounds: int) -> dict[str, float]:
    """Median seconds per step."""
    torch.manual_seed(0)
    resident = one.residents["float32"]
    adapters = {
        f"{kind} {row}": random_adapter(one.model.unet, pattern, rank)
        for kind, (pattern, rank) in KINDS.items()
        for row in range(ROWS)
    }
    resident.model.adapters = adapters
    ways = {"none": step_of(resident, one, [None] * ROWS)}
    for kind in KINDS:
        ways[kind] = step_of(resident, one, [f"{kind} {row}" for row in range(ROWS)])
    return medians(interleaved(ways, rounds))


def measure(rounds: int) -> dict[str, Any]:
    numerics.pin(THREADS)
    begun = time.perf_counter()
    steps = {one.name: measure_case(one, rounds) for one in (shipped(), random_model())}
    held = conditions(threads=THREADS, rounds=rounds, seconds=round(time.perf_counter() - begun))
    return {"steps": steps, "conditions": held}


def as_table(figures: dict[str, Any]) -> str:
    lines = [
        (
            kind,
            *(
                cell
                for one in figures["steps"].values()
                for cell in (1000 * one[kind], f"{one[kind] / one['none']:.2f}x")
            ),
        )
        for kind in figures["steps"][SHIPPED]
    ]
    header = ("adapters of four rows", *(cell for name in figures["steps"] for cell in (f"{name}, ms", "ratio")))
    return f"A guided step of {ROWS} pictures, fp32; ratios to none\n\n{table(header, lines)}"


def main(arguments: Sequence[str] | None = None) -> None:
    measure_rounds(NAME, __doc__, 21, measure, as_table, arguments)


if __name__ == "__main__":
    main()
