"""`firstclaim psql`: PostgreSQL's own client on the service's database, also on an embedded one.

Guarantees: the password is not on psql's command line, where other users of the machine would see it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import Annotated
from urllib.parse import parse_qsl, quote, unquote, urlencode

import typer

from firstclaim.cli.environment import database, dsn_of
from firstclaim.cli.terminal import fail, reported

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help='For psql, e.g. -c "SELECT 1" or -f shop.sql.')
    ] = None,
) -> None:
    """Open psql on the service's database: the embedded one, or DATABASE_URL.

    The exit code is psql's; 3 if there is no psql, and then the address to use with another client is printed.
    """
    from firstclaim.embedded.data_folder import psql_of_wheel
    from firstclaim.urls.postgres import PostgresAddress

    with reported(), database() as settings:
        address, password = without_password(PostgresAddress.of(dsn_of(settings)).libpq_url)
        if (program := psql_of_wheel() or shutil.which("psql")) is None:
            fail(f"psql is not installed: install PostgreSQL's client, or use another one with {address}", 3)
        given = {**os.environ, **({} if password is None else {"PGPASSWORD": password})}
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # psql cancels its query, and we wait for its end
        try:
            done = subprocess.run([program, address, *(arguments or ())], env=given, check=False)
        finally:
            signal.signal(signal.SIGINT, before)
        raise typer.Exit(done.returncode)


def without_password(url: str) -> tuple[str, str | None]:
    """An address of libpq without its password, which may be one of its parameters, and the password."""
    from firstclaim.urls.parts import split

    parts = split(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, password = user.partition(":")
    query = dict(parse_qsl(parts.query))
    found = query.pop("password", unquote(password) if colon else None)
    shown = urlencode(query, safe="/:,", quote_via=quote)  # libpq reads no + as a space
    return f"postgresql://{name}{at}{host}{parts.path}" + (f"?{shown}" if shown else ""), found
