"""A TCP proxy that lets a request through and then breaks the connection instead of passing the answer on."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

_CHUNK: Final = 1 << 16


class LossyProxy:
    """In front of the server at `url`, with two threads per connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (str(parts.hostname), int(parts.port or 6379))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._needle = b""
        self._left = 0
        self.lost = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def lose_answers(self, needle: bytes, times: int = 1) -> None:
        """The next `times` answers to requests that contain `needle`."""
        self._needle, self._left = needle, times

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
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
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            thread = threading.Thread(target=self._relay, args=(client, server))
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        lose = threading.Event()
        answers = threading.Thread(target=_answers, args=(client, server, lose))
        self._threads.append(answers)
        answers.start()
        with contextlib.suppress(OSError):
            while request := client.recv(_CHUNK):
                if self._left and self._needle in request:
                    self._left -= 1
                    self.lost += 1
                    lose.set()
                server.sendall(request)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def _answers(client: socket.socket, server: socket.socket, lose: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while (answer := server.recv(_CHUNK)) and not lose.is_set():  # once it is here, the request has run
            client.sendall(answer)
    for one in (client, server):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
