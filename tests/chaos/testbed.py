"""What a nemesis run breaks: both stores, three services of two builds, and the connections of each to the stores."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from tests.acceptance.harness import Service
from tests.chaos.history import History
from tests.chaos.servers import PostgresServer, RedisServer
from tests.proxy import Proxy

_STARTS_MOST: Final = 30  # `serve` does not start while Postgres is unreachable; an orchestrator starts it again


@dataclass(slots=True)
class Testbed:
    """`spare` is the Redis that takes over. Services and their proxies have the same order."""

    history: History
    postgres: PostgresServer
    redis: RedisServer
    spare: RedisServer
    services: list[Service] = field(default_factory=list)
    redis_proxies: list[Proxy] = field(default_factory=list)
    postgres_proxies: list[Proxy] = field(default_factory=list)
    serving: list[Service] = field(default_factory=list)  # the services to which a load balancer would send

    def take_out(self, service: Service) -> None:
        """The service has ended: nothing more is sent to it."""
        if service in self.serving:
            self.serving.remove(service)

    async def start(self, service: Service) -> None:
        """Start the service, with as many tries as that takes."""
        self.take_out(service)
        for _ in range(_STARTS_MOST):
            await service.kill()  # the processes of the last try that are still alive
            with suppress(AssertionError):
                await service.start()
                self.serving.append(service)
                return
        raise AssertionError(f"does not start:\n{service.tail}")

    def service(self, lane: str) -> Service:
        """The service to which the lane belongs."""
        return self.services[int(lane.rpartition(" ")[2]) - 1]
