"""`python -m tests.on_redis PROGRAM [ARGUMENT]...`: tests on another Redis or Valkey, of which PROGRAM is the server.

ARGUMENT is for pytest; default: `tests/integration`. The exit code is pytest's.
"""

import asyncio
import os
import sys
from pathlib import Path

from tests.chaos.servers import RedisServer, own_servers


async def run(program: Path, arguments: list[str]) -> int:
    """Start the server, run pytest."""
    async with own_servers() as servers:
        server = RedisServer(program, servers._place("redis"), servers._user, {})
        servers._made.append(server)
        await server.start()
        found = await server.call("INFO", "server")
        print(*(f"{name} {found[name]}" for name in ("valkey_version", "redis_version") if name in found), flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *(arguments or ["tests/integration"])]
        tests = await asyncio.create_subprocess_exec(*command, env=os.environ | {"TEST_REDIS_URL": server.url})
        return await tests.wait()


if __name__ == "__main__":
    if len(sys.argv) < 2 or not os.access(sys.argv[1], os.X_OK):
        sys.exit(f"{__doc__}\nPROGRAM: expected `redis-server` or `valkey-server`")
    # Absolute: a server runs in another folder. As it is called: Debian's is a link to a program of several names.
    sys.exit(asyncio.run(run(Path(sys.argv[1]).absolute(), sys.argv[2:])))
