"""`python -m tests.on_postgres BIN [ARGUMENT]...`: tests on the PostgreSQL in folder BIN, as a role with few rights.

The role is no superuser and may create databases and roles. `pg_control_system` is revoked, as on some managed servers,
so the ledger's epoch has no timeline. ARGUMENT is for pytest; default: `tests/integration`. The exit code is pytest's.
"""

import asyncio
import os
import sys
from pathlib import Path

import asyncpg

from firstclaim.embedded.processes import _run
from tests.chaos.servers import PostgresServer, own_servers
from tests.stores import with_database

_ROLE = "tester"
_DATABASES = (
    "template1",
    "postgres",
)  # a function's rights are a database's own, and new ones are copied from the first
_CLUSTER = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
# A role that is no superuser cannot drop a database by force while autovacuum is at work in it.
_SETTINGS = {"fsync": "off", "max_connections": "200", "autovacuum": "off"}


async def run(programs: Path, arguments: list[str]) -> int:
    """Start the server, make the role, run pytest."""
    async with own_servers() as servers:
        place = servers._place("postgres")
        _run([str(programs / "initdb"), *_CLUSTER, "-D", str(place / "data")], servers._user)
        server = PostgresServer(programs / "postgres", place, servers._user, _SETTINGS)
        servers._made.append(server)
        await server.start()
        admin = await asyncpg.connect(with_database(server.url, "postgres"))
        await admin.execute("ALTER DATABASE template0 ALLOW_CONNECTIONS true")
        await admin.close()
        for name in _DATABASES:
            admin = await asyncpg.connect(with_database(server.url, name))
            await admin.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
            await admin.close()
        admin = await asyncpg.connect(with_database(server.url, "postgres"))
        await admin.execute(f"CREATE ROLE {_ROLE} LOGIN CREATEDB CREATEROLE")
        print(await admin.fetchval("SELECT version()"), flush=True)
        await admin.close()
        url = with_database(server.url, "postgres").replace("postgres@", f"{_ROLE}@")
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *(arguments or ["tests/integration"])]
        tests = await asyncio.create_subprocess_exec(*command, env=os.environ | {"TEST_DATABASE_URL": url})
        return await tests.wait()


if __name__ == "__main__":
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "postgres").exists():
        sys.exit(f"{__doc__}\nBIN: expected the folder of `initdb` and `postgres`")
    # Absolute: a server runs in another folder.
    sys.exit(asyncio.run(run(Path(sys.argv[1]).resolve(), sys.argv[2:])))
