"""A TCP proxy that lets a request through and then breaks the connection instead of passing the answer on."""

import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial

from tests.relay import CHUNK, TcpRelay, hang_up


class LossyProxy(TcpRelay):
    """In front of the server at `url`."""

    def __init__(self, url: str) -> None:
        super().__init__(url, usual_port=6379)
        self._needle = b""
        self._left = 0
        self.lost = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def lose_answers(self, needle: bytes, times: int = 1) -> None:
        """The next `times` answers to requests that contain `needle`."""
        self._needle, self._left = needle, times

    def directions(self, client: socket.socket, server: socket.socket) -> tuple[Callable[[], None], Callable[[], None]]:
        lose = threading.Event()
        return partial(self._requests, client, server, lose), partial(_answers, client, server, lose)

    def _requests(self, client: socket.socket, server: socket.socket, lose: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while request := client.recv(CHUNK):
                if self._left and self._needle in request:
                    self._left -= 1
                    self.lost += 1
                    lose.set()
                server.sendall(request)
        hang_up(server)


def _answers(client: socket.socket, server: socket.socket, lose: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while (answer := server.recv(CHUNK)) and not lose.is_set():  # once it is here, the request has run
            client.sendall(answer)
    for one in (client, server):
        hang_up(one)
