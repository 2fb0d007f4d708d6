"""A primary, a replica and a Sentinel, as real processes on loopback, with the rights that operations.md advises."""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import quote

from redis import Redis
from redis.exceptions import RedisError

from broker.connection import REDIS_UNAVAILABLE, text
from broker.embedded import find_server, free_port

SERVICE: Final = "darkroom"
PASSWORD: Final = "sl/sh@t"
RIGHTS: Final = "~rq:* ~darkroom:* +@all -@admin -@dangerous +info +client|list"
_OF_OTHERS: Final = "for-replicas"
_OF_SENTINELS: Final = "for-asking"
_PATIENCE_SECONDS: Final = 30.0
_TRIES: Final = 60

Answer = TypeVar("Answer")


def start_sentinel(folder: Path, port: int, primary: int, more: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """It takes a primary for dead after 300 ms, and alone decides what to do. `more` are lines of its configuration."""
    lines = [
        f"bind 127.0.0.1\nport {port}\ndir {folder}\nlogfile {folder / 'log'}",
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 1",
        f"sentinel down-after-milliseconds {SERVICE} 300",
        f"sentinel failover-timeout {SERVICE} 2000",
        *more,
    ]
    config = folder / "sentinel.conf"
    config.write_text("\n".join(lines) + "\n")
    return _start(str(config), "--sentinel")


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [find_server(), *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def patiently(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """As callers of a gateway do, and workers."""
    for _ in range(_TRIES):
        try:
            return await call()
        except REDIS_UNAVAILABLE:
            await asyncio.sleep(0.05)
    return await call()


class SentinelSet:
    """Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ports = (free_port(), free_port())
        self._sentinel_port = free_port()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Its first Sentinel is not there."""
        sentinels = f"127.0.0.1:{free_port()},127.0.0.1:{self._sentinel_port}"
        user = f"darkroom:{quote(PASSWORD, safe='')}"
        return f"redis+sentinel://{user}@{sentinels}/{SERVICE}/1?sentinel_password={_OF_SENTINELS}"

    def __enter__(self) -> Self:
        try:
            first, second = self.ports
            self.start(first)
            self.start(second, "--replicaof", "127.0.0.1", str(first))
            self.wait_for(second, lambda server: server.info("replication")["master_link_status"] == "up")
            self._start_sentinel(first)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self, port: int, *options: str) -> None:
        """A server without data that takes itself for a primary, unless told otherwise."""
        folder = self._folder / str(port)
        folder.mkdir(exist_ok=True)
        self._processes[port] = _start(
            "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--logfile", str(folder / "log"),
            "--save", "", "--repl-diskless-sync-delay", "0", "--requirepass", _OF_OTHERS, "--masterauth", _OF_OTHERS,
            "--user", "darkroom", "on", f">{PASSWORD}", *RIGHTS.split(), *options,
        )  # fmt: skip
        self.wait_for(port, lambda server: bool(server.ping()))

    def kill(self, port: int) -> None:
        process = self._processes.pop(port)
        process.kill()
        process.wait()

    def fail_over(self) -> None:
        """As an operator does, with both servers alive. Returns when the other is the primary."""
        old = self.primary()
        (new,) = {*self.ports} - {old}
        with self._sentinel() as sentinel:
            self.wait_for(old, lambda _: bool(sentinel.execute_command("SENTINEL FAILOVER", SERVICE)))
        self.wait_for(old, lambda server: server.info("replication")["role"] == "slave")
        self.wait_for(new, lambda _: self.primary() == new)

    def primary(self) -> int:
        """Its port, as the Sentinel says."""
        with self._sentinel() as sentinel:
            return int(sentinel.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def replicate(self) -> None:
        """Returns when the replica has all that was written before."""
        with self.server(self.primary()) as server:
            server.incr("barrier")
            assert server.wait(1, round(_PATIENCE_SECONDS * 1000)) == 1

    def server(self, port: int) -> Redis:
        """A client with all rights."""
        return Redis(port=port, password=_OF_OTHERS, db=1, protocol=2)

    def wait_for(self, port: int, condition: Callable[[Redis], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with self.server(port) as server:
            while True:
                try:
                    if condition(server):
                        return
                except RedisError as error:
                    last: object = error
                else:
                    last = "not yet"
                assert time.monotonic() < deadline, last
                time.sleep(0.02)

    def _start_sentinel(self, primary: int) -> None:
        folder = self._folder / "sentinel"
        folder.mkdir()
        passwords = (f"requirepass {_OF_SENTINELS}", f"sentinel auth-pass {SERVICE} {_OF_OTHERS}")
        self._processes[self._sentinel_port] = start_sentinel(folder, self._sentinel_port, primary, passwords)
        with self._sentinel() as sentinel:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:  # how often it looks at servers, and how soon it believes that one has come back
                    sentinel.execute_command("SENTINEL DEBUG", "info-period", 100, "publish-period", 100)
                    replicas = sentinel.execute_command("SENTINEL REPLICAS", SERVICE)
                    if len(replicas) == 1 and b"ok" in replicas[0]:
                        return
                except RedisError:
                    pass
                assert time.monotonic() < deadline, text((folder / "log").read_bytes())
                time.sleep(0.02)

    def _sentinel(self) -> Redis:
        return Redis(port=self._sentinel_port, password=_OF_SENTINELS, protocol=2)

    def _stop(self) -> None:
        for port in list(self._processes):
            self.kill(port)
