"""A history on a Postgres and a Redis of its own, for what breaks these two."""

from dataclasses import dataclass

from tests.chaos.history import History
from tests.chaos.servers import PostgresServer, RedisServer


@dataclass(frozen=True, slots=True)
class Own:
    """Both servers run when the test begins, and are mended after it, however it has left them."""

    history: History
    postgres: PostgresServer
    redis: RedisServer

    async def mend(self) -> None:
        """Both up, and nothing of them frozen."""
        for server in (self.postgres, self.redis):
            server.resume()
            if not server.running:
                await server.start()
