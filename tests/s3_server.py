"""A real HTTP S3 API on loopback (moto's server), and a relay in front of it that can be slow, silent or gone."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import boto3
import httpx
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

from broker.embedded import free_port
from tests.relay import CHUNK, TcpRelay, hang_up

BUCKET: Final = "pictures"


class _Quiet(MotoRequestHandler):
    def log_request(self, *args: Any, **more: Any) -> None:
        pass


class S3Server:
    """Has the bucket BUCKET. Use as a context manager; inside, it may be stopped and started again on the same port
    with what it holds. One at a time per process, since moto keeps its state in the process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        self._check_signatures(False)
        httpx.post(f"{self.url}/moto-api/reset").raise_for_status()
        httpx.put(f"{self.url}/{BUCKET}").raise_for_status()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", self.port, app, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def client(self, service: str = "s3") -> Any:
        """Boto's own, of another origin than what is tested."""
        return boto3.client(service, endpoint_url=self.url)

    def make_key(self) -> dict[str, str]:
        """From now on requests are checked as AWS does. The environment of whoever may do everything."""
        iam = self.client("iam")
        iam.create_user(UserName="darkroom")
        everything = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
        iam.put_user_policy(UserName="darkroom", PolicyName="all", PolicyDocument=everything)
        key = iam.create_access_key(UserName="darkroom")["AccessKey"]
        self._check_signatures(True)
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def _check_signatures(self, check: bool) -> None:
        httpx.post(f"{self.url}/moto-api/reset-auth", content="0" if check else "inf").raise_for_status()


def environment(url: str) -> dict[str, str]:
    """What a process finds that has its store at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": ",".join(filter(None, ("127.0.0.1,localhost", os.environ.get("NO_PROXY")))),
    }


class Relay(TcpRelay):
    """Passes connections on to `url`."""

    def __init__(self, url: str) -> None:
        super().__init__(url, usual_port=80)
        self.url = f"http://localhost:{self.port}"
        self._flowing = threading.Event()
        self._flowing.set()
        self._pause = 0.0
        self._closing = threading.Event()

    def hold(self) -> None:
        """Answers stay here until `release`."""
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    def trickle(self, pause: float) -> None:
        """Answers come in single bytes with `pause` seconds between them."""
        self._pause = pause

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._flowing.set()
        super().__exit__(kind, error, trace)

    def directions(self, client: socket.socket, server: socket.socket) -> tuple[Callable[[], None], Callable[[], None]]:
        return partial(self._pass_on, client, server, False), partial(self._pass_on, server, client, True)

    def _pass_on(self, source: socket.socket, target: socket.socket, held: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if held:
                    self._flowing.wait()
                    self._send_slowly(target, data)
                else:
                    target.sendall(data)
        hang_up(target)

    def _send_slowly(self, target: socket.socket, data: bytes) -> None:
        while data and self._pause and not self._closing.wait(self._pause):
            target.sendall(data[:1])
            data = data[1:]
        target.sendall(data)
