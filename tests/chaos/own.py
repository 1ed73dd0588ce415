"""A history on a Postgres and a Redis that belong to one test, for faults of these two."""

import os
from dataclasses import dataclass

from tests.acceptance.command import SECRET, Command
from tests.acceptance.harness import PYTHON_PATH
from tests.chaos.history import History
from tests.chaos.servers import PostgresServer, RedisServer


@dataclass(frozen=True, slots=True)
class Own:
    """Both servers run when the test begins. They end with it, in whatever state it has left them."""

    history: History
    postgres: PostgresServer
    redis: RedisServer

    @property
    def command(self) -> Command:
        """Runs `firstclaim` on these servers."""
        folder = self.history.sandbox.folder / "command"
        folder.mkdir(exist_ok=True)
        addresses = {"DATABASE_URL": self.postgres.url, "REDIS_URL": self.redis.url, "STRIPE_WEBHOOK_SECRETS": SECRET}
        return Command(folder, {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH, **addresses})
