"""Servers and Sentinels over TLS, with a certificate of an authority of one's own."""

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker.connection import REDIS_UNAVAILABLE, connect
from broker.embedded import EmbeddedValkey, free_port
from broker.gateway_side import JobBroker
from broker.worker_side import WorkerBroker
from contract.card import ModelCard
from contract.settings import Settings
from contract.spec import JobSpec
from tests.broker.sentinel_set import SERVICE, patiently, start_sentinel
from tests.relay import CHUNK, TcpRelay, hang_up

MakeSpec = Callable[..., JobSpec]
TLS_HANDSHAKE = b"\x16"


class TlsRelay(TcpRelay):
    """Ends TLS before a server that has none, as the one in the wheel; what comes in plain passes in plain, so that a
    Sentinel may watch the address that clients are told."""

    def __init__(self, url: str, certificate: Path) -> None:
        super().__init__(url, usual_port=6379)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self.handshakes = 0

    def directions(self, client: socket.socket, server: socket.socket) -> tuple[Callable[[], None], Callable[[], None]]:
        return partial(self._both, client, server), lambda: None

    def _both(self, client: socket.socket, server: socket.socket) -> None:
        """In one thread: OpenSSL's connections bear no two."""
        with contextlib.suppress(OSError):
            if client.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
                client = self._context.wrap_socket(client, server_side=True)
                self._sockets.append(client)
                self.handshakes += 1
            self._pass(client, server)
        for one in (client, server):
            hang_up(one)

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        """Until one of them ends."""
        while True:
            buffered = isinstance(client, ssl.SSLSocket) and client.pending()
            for one in [client] if buffered else select.select([client, server], [], [])[0]:
                if not (data := one.recv(CHUNK)):
                    return
                (server if one is client else client).sendall(data)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its key, for 127.0.0.1: what Sentinels tell is an address, unless they are set to announce host names."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "darkroom tests")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    path.write_bytes(private + made.public_bytes(encoding))
    return path


@pytest.fixture
def relays(certificate: Path, tmp_path: Path) -> Iterator[tuple[TlsRelay, TlsRelay]]:
    """Before a server, and before a Sentinel that watches it."""
    sentinel_port = free_port()
    with EmbeddedValkey() as server, TlsRelay(server.url, certificate) as primary:
        sentinel = start_sentinel(tmp_path, sentinel_port, primary.port)
        try:
            with TlsRelay(f"redis://127.0.0.1:{sentinel_port}", certificate) as before_sentinel:
                yield primary, before_sentinel
        finally:
            sentinel.kill()
            sentinel.wait()


async def test_both_sides_speak_tls_to_all(
    relays: tuple[TlsRelay, TlsRelay], certificate: Path, settings: Settings, card: ModelCard, make_spec: MakeSpec
) -> None:
    primary, sentinel = relays
    url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/{SERVICE}?ssl_ca_certs={certificate}"
    followed = settings.model_copy(update={"redis_url": url})
    gateway, worker = JobBroker(followed), WorkerBroker(followed, [card], slots=8)
    spec = make_spec()
    await patiently(lambda: gateway.submit(spec))
    assert [job.job_id for job in await asyncio.to_thread(worker.take, 1)] == [spec.id]
    worker.close()
    await gateway.close()
    assert min(primary.handshakes, sentinel.handshakes) >= 2

    url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/{SERVICE}"
    with connect(url) as stranger, pytest.raises(REDIS_UNAVAILABLE, match="certificate verify failed"):
        stranger.ping()
