"""What a command takes from its environment: settings, the database, the signing secret, the operator's name."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from firstclaim.errors import ConfigurationError, LedgerUnavailable, OperatorError

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.settings import Settings

T = TypeVar("T")

_ending: list[ExitStack] = []  # of the command that this process runs


def read_settings(*, receiving: bool = True, flags: Mapping[str, Any] = MappingProxyType({})) -> Settings:
    """The settings; also configures logging. `receiving`: whether the command needs what only a receiver needs.

    `flags` are settings that options override.
    """
    from firstclaim.observability.logging import configure
    from firstclaim.settings import load_settings

    settings = load_settings(receiving=receiving, flags=flags)
    configure(settings.log_format, settings.log_level)
    return settings


@contextmanager
def whole_command() -> Iterator[None]:
    """The embedded servers that a command uses in the block are stopped after it: the command has printed its result.

    A command that started them waits then for those that share them (`firstclaim.embedded`), for as long as they run.
    """
    with ExitStack() as stack:
        _ending.append(stack)
        try:
            yield
        finally:
            _ending.clear()


@contextmanager
def shared_servers(settings: Settings) -> Iterator[Settings]:
    """The settings with the addresses of embedded servers: those that run on the data folder, or else our own.

    Raises `OperatorError` where the Postgres of these servers stops in the block: no advice about DATABASE_URL helps.
    """
    from firstclaim.embedded.data_folder import servers
    from firstclaim.postgres.advice import is_lost

    with ExitStack() as block:
        stack = _ending[0] if _ending else block
        ready = stack.enter_context(servers(settings, share=True))
        if _ending and ready is not settings:
            stack.callback(_end_output)
        try:
            yield ready
        except LedgerUnavailable as error:
            if settings.embedded_database and is_lost(error):
                raise embedded_stopped(settings) from error
            raise


def embedded_stopped(settings: Settings) -> OperatorError:
    """The error of a command that used the embedded Postgres when the process that ran it ended."""
    return OperatorError(
        f"the embedded Postgres of {settings.data_dir} has stopped (the service on this folder was stopped, or ended): "
        "run the command again"
    )


def _end_output() -> None:
    """Let the reader of our output see its end: it may be a command that shares our servers, and that we wait for."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def database(flags: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Settings]:
    """Settings with a database address, for commands that use Postgres alone: no Redis and no secret needed.

    `flags` are settings that options override.
    """
    from firstclaim.embedded.data_folder import require_store

    settings = read_settings(receiving=False, flags=flags)
    require_store(settings, "database_url")
    if settings.database_url:
        yield settings
        return
    with shared_servers(settings) as ready:
        yield ready


def dsn_of(settings: Settings) -> str:
    """The database's address. Raises `ConfigurationError` if there is none."""
    if settings.database_url is None:
        raise ConfigurationError(["DATABASE_URL is missing"])
    return settings.database_url.get_secret_value()


def run_on_ledger(settings: Settings, work: Callable[[Commands], Awaitable[T]]) -> T:
    """Run `work` in an event loop and on a connection of its own. Raises `LedgerUnavailable`."""
    import asyncio

    from firstclaim.operations.commands import Commands

    async def connect_and_run() -> T:
        timeout = settings.postgres_timeout_seconds
        async with Commands.connect(dsn_of(settings), timeout, settings.schema_name) as operations:
            return await work(operations)

    return asyncio.run(connect_and_run())


def endpoint_url(endpoint: str) -> str:
    """Where `serve` listens here for the named endpoint; "": for the one without a name."""
    url = read_settings(receiving=False).webhook_url
    return f"{url}/{endpoint}" if endpoint else url


def signing_secret(given: str, endpoint: str = "") -> str:
    """The secret of `--secret`, or else the one that `serve` uses here. Raises `ConfigurationError`.

    `endpoint`: the name of the endpoint whose secret it is; "": the one without a name.
    """
    from firstclaim.embedded.data_folder import stored_secret
    from firstclaim.urls.stripe import check_signing_secrets

    if given:
        try:
            check_signing_secrets([given])
        except ValueError as error:
            raise ConfigurationError([f"--secret: {error}"]) from error
        return given

    settings = read_settings()
    endpoints = settings.endpoints
    if secrets := endpoints.get(endpoint or None):
        return secrets[0]
    if names := sorted(name for name in endpoints if name is not None):
        raise ConfigurationError(
            [f"STRIPE_WEBHOOK_SECRETS has no {_secret_of(endpoint)}; --endpoint {' or '.join(names)}"]
        )
    if endpoint:
        raise ConfigurationError([f"STRIPE_WEBHOOK_SECRETS has no {_secret_of(endpoint)}: add {endpoint}=whsec_..."])
    if (secret := stored_secret(settings)) is not None:
        return secret
    raise ConfigurationError(
        [f"no signing secret: set STRIPE_WEBHOOK_SECRETS, or start `firstclaim serve` on {settings.data_dir} first"]
    )


def _secret_of(endpoint: str) -> str:
    return f"secret of an endpoint {endpoint!r}" if endpoint else "secret of the endpoint without a name"


def operator() -> str:
    """`user@host`, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
