"""A TCP relay on loopback, for proxies that harm what passes through them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

CHUNK: Final = 1 << 16


class TcpRelay:
    """In front of the server at `url`, with two threads per connection, whose work `directions` gives. Use as a
    context manager. A client whose server is away is hung up on."""

    def __init__(self, url: str, usual_port: int) -> None:
        parts = urlsplit(url)
        self._server = (str(parts.hostname), int(parts.port or usual_port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    def directions(self, client: socket.socket, server: socket.socket) -> tuple[Callable[[], None], Callable[[], None]]:
        """Passes requests on, and answers back, each until its end."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            hang_up(one)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            try:
                server = socket.create_connection(self._server)
            except ConnectionRefusedError:
                hang_up(client)
                continue
            self._sockets.append(server)
            self.connections += 1
            for direction in self.directions(client, server):
                thread = threading.Thread(target=direction)
                self._threads.append(thread)
                thread.start()


def hang_up(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
