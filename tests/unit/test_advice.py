"""What the commands say of an error of Postgres: its name, and what to do, without a word of its message."""

import socket
import ssl

import asyncpg
import pytest
from sqlalchemy.exc import OperationalError

from firstclaim.errors import LedgerUnavailable
from firstclaim.postgres.advice import explain, is_lost
from firstclaim.postgres.connection import UNAVAILABLE

VALUE = "c4n4rypw"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ConnectionRefusedError(111, VALUE), ("ConnectionRefusedError", "host", "port", "that the server runs")),
        (ConnectionResetError(VALUE), ("ConnectionResetError", "that the server runs")),
        (socket.gaierror(-2, VALUE), ("gaierror", "host name in DATABASE_URL")),
        (FileNotFoundError(2, VALUE), ("FileNotFoundError", "socket", "path in DATABASE_URL")),
        (ssl.SSLError(1, VALUE), ("SSLError", "sslmode")),
        (TimeoutError(), ("TimeoutError", "FIRSTCLAIM_POSTGRES_TIMEOUT_SECONDS")),
        (asyncpg.InvalidPasswordError(VALUE), ("28P01", "password in DATABASE_URL")),
        (asyncpg.InvalidAuthorizationSpecificationError(VALUE), ("28000", "pg_hba.conf")),
        (asyncpg.InvalidCatalogNameError(VALUE), ("3D000", "create it")),
        (asyncpg.UndefinedTableError(VALUE), ("42P01", "`firstclaim migrate`")),
        (asyncpg.UndefinedColumnError(VALUE), ("42703", "`firstclaim migrate`")),
        (asyncpg.InsufficientPrivilegeError(VALUE), ("42501", "grant it")),
        (asyncpg.TooManyConnectionsError(VALUE), ("53300", "max_connections")),
        (asyncpg.CannotConnectNowError(VALUE), ("57P03", "starting")),
        (asyncpg.LockNotAvailableError(VALUE), ("55P03", "pg_stat_activity")),
        (asyncpg.QueryCanceledError(VALUE), ("57014", "took too long")),
        (asyncpg.ReadOnlySQLTransactionError(VALUE), ("25006", "primary")),
        (asyncpg.ConnectionDoesNotExistError(VALUE), ("08003", "that the server runs")),
        (asyncpg.InterfaceError(VALUE), ("InterfaceError", "run the command again")),
        (asyncpg.ClientConfigurationError(VALUE), ("ClientConfigurationError", "`firstclaim check`")),
        (asyncpg.DivisionByZeroError(VALUE), ("22012", "`firstclaim check`")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_advice(error: Exception, shown: tuple[str, ...]) -> None:
    """Each error that a command can meet is one line: its class, its SQLSTATE, and what to do."""
    assert isinstance(error, UNAVAILABLE)
    line = explain(error)
    assert line.startswith(type(error).__name__)
    assert len(line.splitlines()) == 1
    assert VALUE not in line
    for words in shown:
        assert words in line, line


def test_sqlalchemy_wraps_the_drivers_error() -> None:
    """`migrate` works through SQLAlchemy: the advice is that for the driver's error behind it."""
    wrapped = OperationalError(f"SELECT '{VALUE}'", {}, Exception())
    wrapped.__cause__ = asyncpg.InvalidPasswordError(VALUE)
    assert "password in DATABASE_URL" in explain(wrapped)
    assert VALUE not in explain(wrapped)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (FileNotFoundError(), True),
        (ConnectionRefusedError(), True),
        (ConnectionResetError(), True),
        (asyncpg.ConnectionDoesNotExistError(VALUE), True),
        (asyncpg.InterfaceError(VALUE), True),
        (asyncpg.AdminShutdownError(VALUE), True),
        (asyncpg.CrashShutdownError(VALUE), True),
        (asyncpg.CannotConnectNowError(VALUE), True),
        (TimeoutError(), False),
        (asyncpg.QueryCanceledError(VALUE), False),
        (asyncpg.UndefinedTableError(VALUE), False),
        (asyncpg.TooManyConnectionsError(VALUE), False),
    ],
)
def test_a_server_that_has_ended_is_known(error: Exception, lost: bool) -> None:
    """Errors of a server that is gone, or going, are told from those of one that runs, also where they are a cause."""
    above = LedgerUnavailable(VALUE)
    above.__cause__ = error
    assert (is_lost(error), is_lost(above)) == (lost, lost)
