"""`darkroom keys`: who may use the gateways of a Redis."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer
from pydantic import ValidationError
from redis import Redis
from rich.table import Column, Table

from broker.api_keys import ApiKey, Scope, create_key, limit_key, list_keys, revoke_key
from broker.connection import REDIS_UNAVAILABLE, connect
from broker.quotas import OwnLimits
from cli.console import err, out
from contract.redis_url import without_password
from contract.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Make, list, limit and revoke the API keys of a service.")

RedisUrl = Annotated[
    str, typer.Option("--redis-url", envvar="DARKROOM_REDIS_URL", help="Redis or Valkey that the gateways use.")
]
KeyId = Annotated[str, typer.Argument(help="The key's id, as `darkroom keys list` shows it.", metavar="ID")]
Rate = Annotated[float | None, typer.Option("--rate", help="Submits per second in the long run.")]
Burst = Annotated[int | None, typer.Option("--burst", help="Submits at once.")]
MaxRunning = Annotated[int | None, typer.Option("--max-running", help="Jobs in workers at once; its others wait.")]
MaxWaiting = Annotated[
    int | None, typer.Option("--max-waiting", help="Unfinished jobs for one model; beyond it submits get a 429.")
]
DEFAULT_REDIS_URL: str = Settings.model_fields["redis_url"].default


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", help="Who gets the key, e.g. a team. Names need not differ.")],
    scopes: Annotated[
        str, typer.Option("--scopes", help="What it may do, comma-separated: submit, read, admin.")
    ] = "submit,read",
    rate: Rate = None,
    burst: Burst = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
    redis_url: RedisUrl = DEFAULT_REDIS_URL,
) -> None:
    """Make a key and print it, once: only its digest is kept.

    Limits that are not given are those of the gateways' settings. Gateways know the key within a second.
    """
    with _connected(redis_url) as connection, _sensible():
        limits = OwnLimits(rate_per_second=rate, rate_burst=burst, max_running=max_running, max_waiting=max_waiting)
        key, secret = create_key(connection, name, _scopes(scopes), limits)
    out.print(secret, markup=False, highlight=False, soft_wrap=True)
    err.print(
        f"key {key.id} of {key.name}: {_listed(key.scopes)}. It is shown only now; keep it safe.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command("list")
def list_all(
    revoked: Annotated[bool, typer.Option("--revoked", help="Also those that were revoked.")] = False,
    redis_url: RedisUrl = DEFAULT_REDIS_URL,
) -> None:
    """The keys by their ids, the oldest first. Ids stand in logs and with admins' lists of jobs."""
    with _connected(redis_url) as connection:
        known = list_keys(connection)
    table = Table(Column("id", no_wrap=True), "name", "scopes", "limits", "created", *(["revoked"] if revoked else []))
    for key in known:
        if revoked or key.revoked_at is None:
            row = [key.id, key.name, _listed(key.scopes), _limits(key), _time(key.created_at)]
            table.add_row(*row, *([_time(key.revoked_at)] if revoked else []))
    out.print(table, markup=False)


@app.command()
def limit(
    key: KeyId,
    rate: Rate = None,
    burst: Burst = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
    redis_url: RedisUrl = DEFAULT_REDIS_URL,
) -> None:
    """Give a key other limits; those that are not given are then the settings'. Gateways know within a second."""
    with _connected(redis_url) as connection, _sensible():
        limits = OwnLimits(rate_per_second=rate, rate_burst=burst, max_running=max_running, max_waiting=max_waiting)
        found = _existing(limit_key(connection, key, limits), key)
    out.print(f"key {found.id} of {found.name}: limits {_limits(found)}", markup=False, highlight=False)


@app.command()
def revoke(key: KeyId, redis_url: RedisUrl = DEFAULT_REDIS_URL) -> None:
    """Let a key in no more: gateways know within a second. Its jobs go on; an admin can cancel them."""
    with _connected(redis_url) as connection:
        found = _existing(revoke_key(connection, key), key)
        left = any(other.revoked_at is None for other in list_keys(connection))
    out.print(f"key {found.id} of {found.name}: revoked", markup=False, highlight=False)
    if not left:
        err.print("no key is left: gateways without DARKROOM_API_KEYS refuse everybody until one is made")


@contextmanager
def _connected(redis_url: str) -> Iterator[Redis]:
    try:
        with connect(redis_url) as connection:
            yield connection
    except REDIS_UNAVAILABLE as error:
        fault = f"no Redis or Valkey answered at {without_password(redis_url)} ({error})"
    except ValidationError as error:
        fault = f"a key in this Redis cannot be read, perhaps a newer version made it ({error.errors()[0]['msg']})"
    except ValueError as error:
        fault = str(error)
    else:
        return
    err.print(f"{fault}; name the gateways' Redis with --redis-url or DARKROOM_REDIS_URL", style="red", markup=False)
    raise typer.Exit(1)


@contextmanager
def _sensible() -> Iterator[None]:
    """Of what is asked for a key."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _existing(found: ApiKey | None, key: str) -> ApiKey:
    if found is None:
        err.print(f"no key has the id {key!r}; `darkroom keys list` shows the ids", style="red", markup=False)
        raise typer.Exit(1)
    return found


def _scopes(given: str) -> list[Scope]:
    try:
        return [Scope(part.strip()) for part in given.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{error}; expected some of {_listed(Scope)}", param_hint="--scopes") from error


def _listed(scopes: frozenset[Scope] | type[Scope]) -> str:
    return ", ".join(scope for scope in Scope if scope in scopes)


def _limits(key: ApiKey) -> str:
    """Only the key's own."""
    own = {
        "rate": key.limits.rate_per_second,
        "burst": key.limits.rate_burst,
        "running": key.limits.max_running,
        "waiting": key.limits.max_waiting,
    }
    return ", ".join(f"{name} {value:g}" for name, value in own.items() if value is not None) or "as set"


def _time(unix_seconds: float | None) -> str:
    return "" if unix_seconds is None else datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M")
