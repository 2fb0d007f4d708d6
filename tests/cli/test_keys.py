"""`darkroom keys` against a real Redis: made, shown once, listed, revoked."""

import re

import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from broker.api_keys import Scope, is_damaged, key_id, list_keys
from broker.embedded import EmbeddedValkey, free_port
from broker.quotas import OwnLimits
from cli.main import app
from contract import keys


def run(server: EmbeddedValkey, *arguments: str) -> Result:
    environment = {"DARKROOM_REDIS_URL": server.url, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["keys", *arguments], env=environment)


def test_a_key_is_shown_once_and_can_be_revoked(redis_client: Redis, valkey_server: EmbeddedValkey) -> None:
    made = run(valkey_server, "create", "--name", "painters [1]", "--scopes", "read, submit", "--rate", "2.5",
               "--burst", "10", "--max-running", "3", "--max-waiting", "40")  # fmt: skip
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert re.fullmatch(r"dk_[0-9A-Za-z]{49}", secret)  # alone, so that a script can take it
    assert not is_damaged(secret)
    assert f"key {key_id(secret)} of painters [1]: submit, read" in made.stderr
    (stored,) = list_keys(redis_client)
    assert stored.scopes == {Scope.SUBMIT, Scope.READ}
    assert stored.limits == OwnLimits(rate_per_second=2.5, rate_burst=10, max_running=3, max_waiting=40)
    limited = run(valkey_server, "limit", stored.id, "--rate", "0.5", "--max-running", "1")
    assert limited.stdout.strip() == f"key {stored.id} of painters [1]: limits rate 0.5, running 1"
    assert list_keys(redis_client)[0].limits == OwnLimits(rate_per_second=0.5, max_running=1)
    run(valkey_server, "create", "--name", "operators", "--scopes", "admin")
    listed = run(valkey_server, "list").stdout
    assert secret[3:20] not in listed
    limits = "rate 0.5, running 1"
    for text in (stored.id, "painters [1]", limits, "submit, read, admin", "as set"):
        assert text in listed
    revoked = run(valkey_server, "revoke", stored.id)
    assert (revoked.exit_code, revoked.stdout.strip()) == (0, f"key {stored.id} of painters [1]: revoked")
    assert "no key is left" not in revoked.stderr
    assert stored.id not in run(valkey_server, "list").stdout
    assert stored.id in run(valkey_server, "list", "--revoked").stdout


def test_revoking_the_last_key_says_what_it_means(redis_client: Redis, valkey_server: EmbeddedValkey) -> None:
    secret = run(valkey_server, "create", "--name", "team").stdout.strip()
    assert "no key is left" in run(valkey_server, "revoke", key_id(secret)).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--name", "team", "--scopes", "submit,paint"), "expected some of submit, read, admin"),
        (("create", "--name", "team", "--scopes", ""), "scopes: "),
        (("create", "--name", ""), "name: "),
        (("create", "--name", "team", "--rate", "0"), "rate_per_second: "),
        (("create", "--name", "team", "--max-running", "-1"), "max_running: "),
        (("limit", "0123456789abcdef", "--max-waiting", "0"), "max_waiting: "),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(
    redis_client: Redis, valkey_server: EmbeddedValkey, arguments: tuple[str, ...], message: str
) -> None:
    refused = run(valkey_server, *arguments)
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.replace("│", " ").split())
    assert list_keys(redis_client) == []


def test_what_is_not_there_is_said(redis_client: Redis, valkey_server: EmbeddedValkey) -> None:
    for command in ("revoke", "limit"):
        unknown = run(valkey_server, command, "0123456789abcdef")
        assert unknown.exit_code == 1
        assert "no key has the id '0123456789abcdef'" in unknown.stderr
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    for url, fault in ((nobody, f"no Redis or Valkey answered at {nobody}"), ("http://127.0.0.1", "neither redis://")):
        away = run(valkey_server, "list", "--redis-url", url)
        assert away.exit_code == 1
        assert fault in " ".join(away.stderr.split())


def test_a_key_of_another_version_is_said(redis_client: Redis, valkey_server: EmbeddedValkey) -> None:
    redis_client.hset(keys.api_keys(), "0123456789abcdef", '{"of": "a later version"}')
    odd = run(valkey_server, "revoke", "0123456789abcdef")
    assert odd.exit_code == 1
    assert "perhaps a newer version made it" in " ".join(odd.stderr.split())
