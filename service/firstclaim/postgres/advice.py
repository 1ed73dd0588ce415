"""What an operator can do about an error of Postgres: one line, for the terminal.

Guarantees: the line is the error's class and SQLSTATE, and constant text. It repeats nothing of a message, a URL or a
row, so it holds no secret.
"""

import socket
import ssl

import asyncpg
from sqlalchemy import exc

_BY_SQLSTATE = {
    "25006": "the server is read-only: set DATABASE_URL to the primary",
    "28000": "the server does not accept this user from here: check DATABASE_URL, and the server's pg_hba.conf",
    "28P01": "check the user and the password in DATABASE_URL",
    "3D000": "the database in DATABASE_URL does not exist: create it, or correct the name",
    "42501": "the user in DATABASE_URL lacks a right on the ledger's tables: grant it",
    "42703": "a column of the ledger is missing: run `firstclaim migrate`",
    "42P01": "a table of the ledger is missing: check the database and FIRSTCLAIM_SCHEMA, and run `firstclaim migrate`",
    "53100": "the server's disk is full: free some space",
    "53300": "the server has no connection left: raise max_connections, or stop other clients",
    "55P03": "another transaction holds a lock on the ledger: find it in pg_stat_activity, then run the command again",
    "57014": "the statement was cancelled, or took too long: run the command again",
    "57P01": "the server ended the connection: run the command again once it runs",
    "57P03": "the server is starting or stopping: run the command again in a moment",
}
# What a server that ends, or has ended, leads to. A TimeoutError, which is an OSError, says only that it is slow.
_ENDING = ("57P01", "57P02", "57P03")
_LOST = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_UNREACHABLE = "check the host, the port and the sslmode in DATABASE_URL, and that the server runs"
_BY_CLASS: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((socket.gaierror,), "the host name in DATABASE_URL cannot be resolved: correct it"),
    ((FileNotFoundError,), "there is no such socket: check the path in DATABASE_URL, and that the server runs"),
    ((ssl.SSLError,), "TLS failed: check sslmode and the certificates in DATABASE_URL"),
    (
        (TimeoutError,),
        "no answer in time: check the server's load, and the network and the host if DATABASE_URL is set; "
        "FIRSTCLAIM_POSTGRES_TIMEOUT_SECONDS is the limit",
    ),
    (
        (asyncpg.TargetServerAttributeNotMatched,),
        "no host in DATABASE_URL accepts writes: name the primary too, or promote a standby",
    ),
    (
        (asyncpg.ClientConfigurationError,),
        "the driver does not accept DATABASE_URL, or a file that it names: `firstclaim check` says why",
    ),
    ((asyncpg.InterfaceError, asyncpg.InternalClientError), "the connection was lost: run the command again"),
    ((OSError, asyncpg.PostgresConnectionError), _UNREACHABLE),
)


def describe(error: BaseException) -> str:
    """Class and SQLSTATE: enough to act on, without the values of a row or a URL that a message can hold."""
    original: BaseException = error
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        original = error.orig.__cause__ or error.orig  # SQLAlchemy's error wraps the driver's
    state = getattr(original, "sqlstate", None)
    return type(original).__name__ + (f" ({state})" if state else "")


def is_lost(error: BaseException) -> bool:
    """Whether the error, or what caused it, says that the server ends, has ended, or just starts."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "sqlstate", None) in _ENDING:
            return True
        if isinstance(cause, _LOST) and not isinstance(cause, TimeoutError):
            return True
        cause = cause.__cause__
    return False


def in_one_line(error: BaseException) -> str:
    """What the server says, with its DETAIL and its HINT, each of which asyncpg puts on a line of its own."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def explain(error: BaseException, otherwise: str = "`firstclaim check` and the server's log say more") -> str:
    """The class and the SQLSTATE of an error that Postgres, its driver or the network raised, and what to do."""
    cause: BaseException | None = error
    while cause is not None:  # SQLAlchemy's error has the driver's as its cause
        if advice := _BY_SQLSTATE.get(getattr(cause, "sqlstate", None) or ""):
            return f"{describe(error)}: {advice}"
        for classes, advice in _BY_CLASS:
            if isinstance(cause, classes):
                return f"{describe(error)}: {advice}"
        cause = cause.__cause__
    return f"{describe(error)}: {otherwise}"
