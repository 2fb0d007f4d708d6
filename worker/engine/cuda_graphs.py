"""One launch for the thousand kernels of a step: captured once per bank and batch size as a CUDA graph, then replayed.

A bank's tensors keep their addresses for life and a step leaves its results in them, which is all that a graph needs.
The graphs share one memory pool: they run one after another on one stream, and none hands a tensor to another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from worker.engine.memory import is_device_lost, is_out_of_memory

if TYPE_CHECKING:
    from worker.engine.bank import Bank

_WARM_UPS = 2

_log = logging.getLogger(__name__)


class GraphedSteps:
    """Runs a step by its graph. Graphs go with their bank; where capturing fails, steps are launched one by one."""

    def __init__(self) -> None:
        self._graphs: WeakKeyDictionary[Bank, dict[int, torch.cuda.CUDAGraph | None]] = WeakKeyDictionary()
        self._pool: Any = None  # a handle whose type torch keeps to itself

    def run(self, step: Callable[[], None], bank: Bank, rows: slice) -> None:
        """`step` advances the slots `rows` of `bank`, all of it on the device. `rows` begins at 0 but for halves."""
        if rows.start:
            step()
            return
        graphs = self._graphs.setdefault(bank, {})
        if rows.stop not in graphs:
            graphs[rows.stop] = self._capture(step, bank)
        graph = graphs[rows.stop]
        if graph is None:
            step()
        else:
            graph.replay()

    def forget(self, bank: Bank) -> None:
        """A step of `bank` launches other kernels from now on."""
        self._graphs.pop(bank, None)

    def _capture(self, step: Callable[[], None], bank: Bank) -> torch.cuda.CUDAGraph | None:
        """Kernels and libraries are warmed up on a side stream first; what that changed in the bank is put back."""
        before = [(tensor, tensor.clone()) for tensor in (bank.x, bank.clean, bank.step)]

        def put_back() -> None:
            for tensor, value in before:
                tensor.copy_(value)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    step()
                    put_back()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        except RuntimeError as error:
            if is_out_of_memory(error) or is_device_lost(error):
                raise
            _log.warning("no CUDA graph, kernels are launched one by one: %s", error)
            graph = None
            put_back()
        return graph
