"""The whole service on this machine: Valkey, a gateway and a worker as child processes, on loopback ports."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from broker.embedded import EmbeddedValkey, NoServerError, free_port
from cli.client import DarkroomClient

STOP_SECONDS = 15.0  # a worker may be in the middle of a forward pass
LOG_TAIL_BYTES = 4000


class StackError(RuntimeError):
    """A part of the stack did not start, or ended by itself; the text ends with its log."""


@dataclass(frozen=True)
class StackConfig:
    """`folder` gets the queue's file, the pictures and the logs; one stack at a time may use it. `port` 0 takes a free
    one. `settings` are environment variables (DARKROOM_...) of the gateway and the worker."""

    folder: Path
    model_dir: Path
    models: Sequence[str]
    port: int = 0
    start_seconds: float = 120.0
    settings: Mapping[str, str] = field(default_factory=dict)


class Stack:
    """Use as a context manager: inside, the service is ready; afterwards no process is left, whatever happened."""

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.url = ""
        self._valkey = EmbeddedValkey(config.folder.resolve() / "valkey")
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Of every process that runs."""
        valkey = {"valkey": self._valkey.pid} if self._valkey.pid else {}
        return valkey | {name: process.pid for name, process in self._parts.items()}

    @property
    def redis_url(self) -> str:
        return self._valkey.url

    def stop(self) -> None:
        """Worker first, queue last, so that what runs can still be handed back. A second Ctrl-C waits for this."""
        with _signals_ignored():
            for name in reversed(self._parts):
                process = self._parts[name]
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            self._parts.clear()
            self._valkey.stop()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def check(self) -> None:
        """Raises `StackError` if a part has ended."""
        for name, process in self._parts.items():
            if process.poll() is not None:
                raise StackError(f"the {name} ended with status {process.returncode}:\n{self._log_tail(name)}")
        if not self._valkey.running:
            raise StackError(f"Valkey ended; its log is {self.config.folder / 'valkey' / 'valkey.log'}")

    def log_path(self, part: str) -> Path:
        return self.config.folder / "logs" / f"{part}.log"

    def _start(self) -> None:
        config = self.config
        (config.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._lock = _claim(config.folder)
        port = config.port or free_port()
        _require_free(port)
        try:
            self._valkey.start()
        except NoServerError as error:
            raise StackError(str(error)) from error
        self.url = f"http://127.0.0.1:{port}"
        environment = (
            os.environ
            | dict(config.settings)
            | {
                "DARKROOM_REDIS_URL": self._valkey.url,
                "DARKROOM_STORE_URL": f"file:{(config.folder / 'store').resolve()}",
                "DARKROOM_HOST": "127.0.0.1",
                "DARKROOM_PORT": str(port),
            }
        )
        worker = ["worker", "--models", ",".join(config.models), "--model-dir", str(config.model_dir)]
        self._spawn("gateway", ["gateway"], environment)
        self._spawn("worker", worker, environment)
        with DarkroomClient(self.url) as client:
            self._wait("gateway", lambda: client.ready() is not None)
            self._wait("worker", lambda: self._all_models_served(client.ready() or {}))

    def _spawn(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """In a session of its own: Ctrl-C in the terminal is for `stop` to pass on, in order. With the lock, so that
        what outlives a killed stack keeps its folder from the next one."""
        assert self._lock is not None
        with self.log_path(name).open("ab") as log:
            self._parts[name] = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock,),
            )

    def _all_models_served(self, workers: Mapping[str, int]) -> bool:
        return all(workers.get(name) for name in self.config.models)

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.config.start_seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                seconds = self.config.start_seconds
                raise StackError(f"the {name} was not ready within {seconds:.0f} s:\n{self._log_tail(name)}")
            time.sleep(0.05)

    def _log_tail(self, name: str) -> str:
        return self.log_path(name).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")


def _claim(folder: Path) -> int:
    """The lock of a folder, as an open file: two Valkeys on one append-only file would ruin it. Raises `StackError`."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StackError(
            f"{folder} is in use by another `darkroom up`, or by what a killed one left running: stop that first, or "
            "give another --data-dir"
        ) from error
    return lock


def _require_free(port: int) -> None:
    """Raises `StackError`; otherwise whatever else listens there would be taken for our gateway."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway does: closed connections linger
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(
                f"port {port} cannot be used ({error.strerror}): give another with --port, or --port 0 for a free one"
            ) from error


@contextmanager
def _signals_ignored() -> Iterator[None]:
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that children are stopped, not orphaned.

    Ctrl-C is set too: a program started in the background of a script inherits it as ignored.
    """

    def unwind(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    handlers = {signal.SIGTERM: unwind, signal.SIGHUP: unwind, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
