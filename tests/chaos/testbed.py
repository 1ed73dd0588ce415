"""What a nemesis run breaks: both stores, three services, and each one's own lines to the stores."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from tests.acceptance.harness import Service
from tests.chaos.history import History
from tests.chaos.servers import PostgresServer, RedisServer
from tests.proxy import Proxy

_STARTS_MOST: Final = 30  # `serve` refuses to start while Postgres is away; whoever runs it tries again


@dataclass(slots=True)
class Testbed:
    """`spare` is the Redis that takes over; lines and services have the same order."""

    history: History
    postgres: PostgresServer
    redis: RedisServer
    spare: RedisServer
    services: list[Service] = field(default_factory=list)
    redis_lines: list[Proxy] = field(default_factory=list)
    postgres_lines: list[Proxy] = field(default_factory=list)
    serving: list[Service] = field(default_factory=list)  # where a load balancer would send to

    def gone(self, service: Service) -> None:
        """It has ended: nothing more is sent there."""
        if service in self.serving:
            self.serving.remove(service)

    async def start(self, service: Service) -> None:
        """Start it as often as it takes."""
        self.gone(service)
        for _ in range(_STARTS_MOST):
            await service.kill()  # whatever is left of it
            with suppress(AssertionError):
                await service.start()
                self.serving.append(service)
                return
        raise AssertionError(f"does not start:\n{service.tail}")

    def service(self, lane: str) -> Service:
        """Whose lane it is."""
        return self.services[int(lane.rpartition(" ")[2]) - 1]
