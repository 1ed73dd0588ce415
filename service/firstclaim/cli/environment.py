"""What a command takes from its environment: settings, the database, the signing secret, the operator's name."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from firstclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from firstclaim.operations.commands import Commands
    from firstclaim.settings import Settings

T = TypeVar("T")


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
def database() -> Iterator[Settings]:
    """Settings with a database address, for commands that use Postgres alone: no Redis and no secret needed."""
    from firstclaim.embedded.data_folder import require_store, servers

    settings = read_settings(receiving=False)
    require_store(settings, "database_url")
    with nullcontext(settings) if settings.database_url else servers(settings, share=True) as ready:
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


def signing_secret(given: str) -> str:
    """The secret of `--secret`, or else the one that `serve` uses here. Raises `ConfigurationError`."""
    from firstclaim.embedded.data_folder import stored_secret
    from firstclaim.urls.stripe import check_signing_secrets

    if given:
        try:
            check_signing_secrets([given])
        except ValueError as error:
            raise ConfigurationError([f"--secret: {error}"]) from error
        return given

    settings = read_settings()
    if settings.stripe_webhook_secrets:
        return settings.stripe_webhook_secrets[0].get_secret_value()
    if (secret := stored_secret(settings)) is not None:
        return secret
    raise ConfigurationError(
        [f"no signing secret: set STRIPE_WEBHOOK_SECRETS, or start `firstclaim serve` on {settings.data_dir} first"]
    )


def operator() -> str:
    """`user@host`, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
