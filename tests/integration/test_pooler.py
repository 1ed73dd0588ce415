"""A transaction-mode pooler is refused, a session-mode one is not. With a real PgBouncer."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from pydantic import SecretStr

from firstclaim.errors import LedgerRefused
from firstclaim.postgres.connect import connect
from firstclaim.server.check import Check
from firstclaim.server.preflight import check_postgres
from firstclaim.settings import Settings
from firstclaim.urls.postgres import postgres_dsn
from tests.acceptance.harness import eventually

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")


async def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
async def pooler(database_url: str) -> AsyncIterator[str]:
    """The URL, up to the database name, of a PgBouncer that serves this test's database in both modes."""
    parts = urlsplit(database_url)
    host = parse_qs(parts.query).get("host", [parts.hostname or ""])[0]
    user = os.stat(host).st_uid if host.startswith("/") else 65534
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = f"host={host} port={parts.port or 5432} dbname={parts.path[1:]} user={parts.username}"
    if parts.password:
        target += f" password={parts.password}"
    # Not in tmp_path: the unprivileged user that a run as root switches to cannot read it.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\nby_transaction = {target} pool_mode=transaction\nby_session = {target} pool_mode=session\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\nunix_socket_dir =\n"
    )
    assert PGBOUNCER is not None
    run_as: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}
    server = subprocess.Popen([PGBOUNCER, str(config)], stderr=subprocess.DEVNULL, cwd="/", **run_as)
    try:
        await eventually(lambda: _accepts(port))
        yield f"postgresql://anyone@127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(10)
        shutil.rmtree(folder)


async def _checks(url: str) -> dict[str, Check]:
    settings = Settings(database_url=SecretStr(url), stripe_webhook_secrets=(SecretStr("whsec_test"),))
    return {check.name: check async for check in check_postgres(settings)}


async def test_transaction_mode_is_refused_by_name(pooler: str) -> None:
    """With transaction pooling the check fails fatally, and its message names PgBouncer and the mode."""
    found = (await _checks(pooler + "by_transaction"))["pooler"]
    assert found.fatal
    assert "PgBouncer" in found.detail
    assert "transaction mode" in found.detail


async def test_session_mode_passes(pooler: str) -> None:
    """With session pooling, which keeps one server connection per client, the check passes."""
    found = await _checks(pooler + "by_session")
    assert "pooler" not in found
    assert found["schema"].verdict == "ok"


@pytest.mark.parametrize(
    "query",
    [
        "search_path=shop&application_name=shop",
        "options=-c%20search_path%3Dshop%20-c%20work_mem%3D8MB",
        "schema=shop&connection_limit=5",
    ],
)
async def test_settings_of_the_session_reach_it_through_a_pooler(pooler: str, query: str) -> None:
    """Settings in the address, which PgBouncer refuses at the start of a connection, are set after it."""
    dsn = postgres_dsn(f"{pooler}by_session?{query}")
    with pytest.raises(asyncpg.ProtocolViolationError, match="unsupported startup parameter"):
        await asyncpg.connect(dsn)
    connection = await connect(dsn, 5, asyncpg.Connection)
    try:
        assert (await connection.fetchval("SELECT current_setting('search_path')")).strip('"') == "shop"
    finally:
        await connection.close()


async def test_an_unknown_parameter_is_named_through_a_pooler(pooler: str) -> None:
    """A parameter that the server behind the pooler does not know is refused by its name."""
    with pytest.raises(LedgerRefused, match="the server refuses the parameter unheard_of") as refused:
        await connect(postgres_dsn(f"{pooler}by_session?unheard_of=1"), 5, asyncpg.Connection)
    assert refused.value.exit_code == 2


async def test_an_unknown_database_at_a_pooler_is_a_refusal(pooler: str) -> None:
    """PgBouncer gives an unknown database a general code; it is called a refusal all the same."""
    with pytest.raises(LedgerRefused, match="ProtocolViolationError"):
        await connect(postgres_dsn(f"{pooler}nowhere"), 5, asyncpg.Connection)
