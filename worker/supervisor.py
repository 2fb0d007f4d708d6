"""One fresh worker process per device, started again when it dies, its jobs put back into the queues at once.

The supervisor is light: it never imports torch and never forks, for CUDA does not survive a fork. Every child has the
read end of a pipe as its standard input (see `worker.child`): when the supervisor dies, by kill -9 too, the pipe ends
and the child drains. That needs no Linux call, lets the jobs be handed back, and cannot be missed as a signal can.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import structlog

from broker.connection import REDIS_UNAVAILABLE
from broker.embedded import free_port
from broker.supervisor_side import SupervisorBroker
from broker.worker_side import worker_name
from contract.settings import Settings
from worker.engine.cores import usable_cores
from worker.supervisor_metrics import SupervisorMetrics

CONFIGURATION_ERROR: Final = 78
"""Exit status (EX_CONFIG of sysexits.h) of a child that would fail again in the same way."""

_HEALTHY_SECONDS: Final = 60.0
_MAX_PAUSE_SECONDS: Final = 30.0
# OpenMP threads that spin for long while they wait are ten times slower as soon as another process wants their cores;
# those that never spin take twice as long over a small picture.
_BRIEF_SPIN: Final = {"GOMP_SPINCOUNT": "1000"}

_log = structlog.get_logger("darkroom.supervisor")


def worker_command(models: Sequence[str], model_dir: Path) -> list[str]:
    """Starts a child that serves `models`; the supervisor adds its device and name."""
    return [sys.executable, "-m", "worker.child", "--models", ",".join(models), "--model-dir", str(model_dir)]


def pause_before_restart(failures: int) -> float:
    """Seconds before the restart after the n-th failure in a row: none, then 1, 2, 4 up to 30."""
    return min(2.0 ** (failures - 2), _MAX_PAUSE_SECONDS) if failures > 1 else 0.0


@dataclass(frozen=True, slots=True)
class _Child:
    """`metrics_port` on loopback; None where nobody asked for metrics."""

    name: str
    process: subprocess.Popen[bytes]
    started: float
    metrics_port: int | None


class Supervisor:
    """`run` keeps one child per entry of `devices`: "cpu" (repeat it for several processes) or "cuda:N".

    `command` comes from `worker_command`. Children read their settings from the environment, as the caller did.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Sequence[str],
        command: Sequence[str],
        healthy_seconds: float = _HEALTHY_SECONDS,
    ) -> None:
        """Whoever has lived for `healthy_seconds` is started again without a pause."""
        self._settings = settings
        self._healthy_seconds = healthy_seconds
        self._devices = tuple(devices)
        self._command = tuple(command)
        self._broker = SupervisorBroker(settings)
        self._messages: SimpleQueue[signal.Signals | None] = SimpleQueue()  # None: a keeper has ended
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._children: dict[int, _Child] = {}
        self._metrics = SupervisorMetrics(len(self._devices), self._metrics_ports)

    def run(self) -> bool:
        """Until SIGTERM or SIGINT and the end of every child, or until no device is left that could be served.

        Children get one SIGTERM per signal: the first lets them finish what they have begun, the second hands all of it
        back at once. Returns whether it was told to stop. Call from the main thread.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._messages.put(signal.Signals(number)))
        if not self._serve_metrics():
            return False
        keepers = [threading.Thread(target=self._guarded_keep, args=(index,)) for index in range(len(self._devices))]
        for keeper in keepers:
            keeper.start()
        left = len(keepers)
        while left:
            if (message := self._messages.get()) is None:
                left -= 1
            else:
                self._forward(message)
        self._broker.close()
        return self._stopping.is_set()

    def _serve_metrics(self) -> bool:
        """False where that was asked for and cannot be."""
        host, port = self._settings.host, self._settings.worker_metrics_port
        if port is None:
            return True
        try:
            port = self._metrics.serve(host, port)
        except OSError as error:
            advice = "set DARKROOM_WORKER_METRICS_PORT to a free port, and DARKROOM_HOST to an address of this machine"
            _log.error(f"no metrics: {advice}", host=host, port=port, error=str(error))
            return False
        _log.info("metrics", url=f"http://{host}:{port}/metrics")
        return True

    def _forward(self, number: signal.Signals) -> None:
        first = not self._stopping.is_set()
        _log.info("stopping" if first else "stopping at once", signal=number.name)
        self._stopping.set()
        with self._lock:
            for child in self._children.values():
                child.process.terminate()
        if first:
            patience = self._settings.drain_seconds + self._settings.lease_seconds
            threading.Thread(target=self._kill_after, args=(patience,), daemon=True).start()

    def _kill_after(self, seconds: float) -> None:
        """A child that is stuck gets no further: what it holds goes back by `_reap`."""
        time.sleep(seconds)
        with self._lock:
            for child in self._children.values():
                _log.error("killed: did not stop in time", worker=child.name, seconds=seconds)
                child.process.kill()

    def _guarded_keep(self, index: int) -> None:
        try:
            self._keep(index)
        finally:
            self._messages.put(None)

    def _keep(self, index: int) -> None:
        """Starts a child over and over. Its death is seen by a blocking wait, so nothing is polled."""
        device, failures = self._devices[index], 0
        while (child := self._start(index)) is not None:
            status = child.process.wait()
            with self._lock:
                del self._children[index]
            if child.process.stdin is not None:
                child.process.stdin.close()
            self._reap(child)
            if self._stopping.is_set():
                return
            if status == CONFIGURATION_ERROR:
                _log.error("gave up: what the worker said above will not change by itself", device=device)
                return
            lived = time.monotonic() - child.started
            failures = 1 if lived > self._healthy_seconds else failures + 1
            pause = pause_before_restart(failures)
            _log.warning("worker ended", worker=child.name, device=device, status=_told(status), restart_in=pause)
            if not self._stopping.wait(pause):
                self._metrics.started_again(index)

    def _start(self, index: int) -> _Child | None:
        """None once stopping. In a session of its own: Ctrl-C in a terminal is for the supervisor to pass on."""
        name, device = worker_name(), self._devices[index]
        port = None if self._settings.worker_metrics_port is None else free_port()
        with self._lock:
            if self._stopping.is_set():
                return None
            process = subprocess.Popen(
                [*self._command, "--device", device, "--name", name],
                env=self._environment(index, port),
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            child = self._children[index] = _Child(name, process, time.monotonic(), port)
        _log.info("worker started", worker=name, device=device, pid=process.pid)
        return child

    def _environment(self, index: int, metrics_port: int | None) -> dict[str, str]:
        """CPU workers divide the cores; every worker shows its metrics to us alone, and we show them to others."""
        environment = ({} if "OMP_WAIT_POLICY" in os.environ else _BRIEF_SPIN) | os.environ
        beside = self._devices.count("cpu")
        if self._devices[index] == "cpu" and beside > 1 and self._settings.worker_threads is None:
            environment["DARKROOM_WORKER_THREADS"] = str(max(1, usable_cores() // beside))
        if metrics_port is not None:
            environment |= {"DARKROOM_WORKER_METRICS_PORT": str(metrics_port), "DARKROOM_HOST": "127.0.0.1"}
        return environment

    def _metrics_ports(self) -> dict[int, int]:
        with self._lock:
            return {index: child.metrics_port for index, child in self._children.items() if child.metrics_port}

    def _reap(self, child: _Child) -> None:
        """Also after a clean end, where nothing is left to do."""
        try:
            swept = self._broker.reap_worker(child.name)
        except REDIS_UNAVAILABLE as error:
            _log.warning("redis away: the jobs come back by their leases", worker=child.name, error=str(error))
            return
        if swept.returned or swept.failed:
            _log.warning("jobs put back", worker=child.name, returned=swept.returned, failed=swept.failed)


def _told(status: int) -> str:
    """An exit status in words: negative ones of `subprocess` are signals."""
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name
