"""Redis servers that fail over by themselves: a Cluster of masters with a replica each, and Sentinels with a master.

Guarantees: a server that was killed comes back on its own port, with its own configuration, as after a reboot. A master
is killed only once its replica has its data, as an operator would expect. Waits are for what the servers say.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

from tests.acceptance.harness import eventually
from tests.chaos.redis_server import SERVICE, SILENT_MS, RedisServer, SentinelServer
from tests.chaos.server import free_port
from tests.chaos.servers import Servers

SLOTS: Final = 16_384
_FORM_SECONDS: Final = 30.0
_FAIL_OVER_SECONDS: Final = 90.0  # a vote that a busy machine has missed is repeated after twice the failover timeout
_LOOPBACK: Final = "127.0.0.1"


@dataclass
class Group:
    """Servers of which the masters may be killed."""

    servers: list[RedisServer]

    @property
    def url(self) -> str:
        """The address for the service."""
        raise NotImplementedError

    async def masters(self) -> list[RedisServer]:
        """Those that take the writes now, by what the group says."""
        raise NotImplementedError

    async def has_failed_over(self, killed: RedisServer) -> None:
        """Wait until another server takes the writes of this one."""
        raise NotImplementedError

    async def rejoined(self, server: RedisServer) -> None:
        """Start a server that was killed, and wait until it is a replica with its master's data."""
        await server.start()
        await eventually(server.is_synced_replica, bool, _FORM_SECONDS)

    def at(self, port: int) -> RedisServer:
        """The server of this port."""
        return next(server for server in self.servers if server.port == port)


@dataclass
class Cluster(Group):
    """Masters, and a replica for each. `settings`, such as `cluster_require_full_coverage`, are those of all nodes."""

    @classmethod
    async def form(cls, servers: Servers, masters: int = 3, *, replicas: bool = True, **settings: str) -> Self:
        """Start the nodes, spread the slots evenly, and wait until all nodes agree."""
        nodes = [
            await servers.redis(
                cluster_enabled="yes",
                cluster_port=str(free_port()),
                cluster_node_timeout=str(SILENT_MS),
                cluster_announce_ip=_LOOPBACK,
                **settings,
            )
            for _ in range(masters * (2 if replicas else 1))
        ]
        for number, node in enumerate(nodes, 1):
            await node.call("CLUSTER", "SET-CONFIG-EPOCH", number)
            if number <= masters:
                await node.call(
                    "CLUSTER", "ADDSLOTSRANGE", (number - 1) * SLOTS // masters, number * SLOTS // masters - 1
                )
        for node in nodes[1:]:
            bus = node.settings["cluster-port"]
            await nodes[0].call("CLUSTER", "MEET", _LOOPBACK, node.port, bus)
        group = cls(nodes)
        await group._all_say(lambda info: info["cluster_known_nodes"] == len(nodes))
        for number, node in enumerate(nodes[masters:]):
            identity = (await nodes[number].call("CLUSTER", "MYID")).decode()
            await node.call("CLUSTER", "REPLICATE", identity)
        await group._all_say(lambda info: info["cluster_state"] == "ok")
        for node in nodes[masters:]:
            await eventually(node.is_synced_replica, bool, _FORM_SECONDS)
        return group

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{_LOOPBACK}:{server.port}" for server in self.servers)

    async def masters(self) -> list[RedisServer]:
        ranges = await self._ranges()
        return [self.at(port) for port in dict.fromkeys(ports[0] for _, _, ports in ranges)]

    async def has_failed_over(self, killed: RedisServer) -> None:
        async def found() -> bool:
            return killed not in await self.masters() and (await self._info())["cluster_state"] == "ok"

        await eventually(found, bool, _FORM_SECONDS)

    @asynccontextmanager
    async def migrating(self, slot: int) -> AsyncIterator[None]:
        """While the block runs, the slot migrates to another master; at its end its keys do, and it has moved."""
        masters = await self.masters()
        source = next(self.at(ports[0]) for first, last, ports in await self._ranges() if first <= slot <= last)
        target = next(master for master in masters if master is not source)
        identity = {each.port: (await each.raw("CLUSTER", "MYID")).decode() for each in (source, target)}
        await target.raw("CLUSTER", "SETSLOT", slot, "IMPORTING", identity[source.port])
        await source.raw("CLUSTER", "SETSLOT", slot, "MIGRATING", identity[target.port])
        yield
        while keys := await source.raw("CLUSTER", "GETKEYSINSLOT", slot, 100):
            await source.raw("MIGRATE", _LOOPBACK, target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            await node.raw("CLUSTER", "SETSLOT", slot, "NODE", identity[target.port])

    async def _ranges(self) -> list[tuple[int, int, list[int]]]:
        found = await self._ask("CLUSTER", "SLOTS")
        return [(first, last, [int(node[1]) for node in nodes]) for first, last, *nodes in found]

    async def _info(self) -> dict[str, Any]:
        return _parsed(await self._ask("CLUSTER", "INFO"))

    async def _ask(self, *command: str) -> Any:
        running = next(server for server in self.servers if server.running)
        return await running.raw(*command)

    async def _all_say(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        async def agree() -> bool:
            return all([wanted(_parsed(await server.raw("CLUSTER", "INFO"))) for server in self.servers])

        await eventually(agree, bool, _FORM_SECONDS)


@dataclass
class Watched(Group):
    """A master with replicas, and the Sentinels that watch it."""

    sentinels: list[SentinelServer]

    @classmethod
    async def form(cls, servers: Servers, replicas: int = 2, sentinels: int = 3) -> Self:
        """Start all of them, and wait until the Sentinels know each other and the replicas."""
        master = await servers.redis()
        others = [await servers.redis(replicaof=f"{_LOOPBACK} {master.port}") for _ in range(replicas)]
        for other in others:
            await eventually(other.is_synced_replica, bool, _FORM_SECONDS)
        watching = [await servers.sentinel(master, sentinels // 2 + 1) for _ in range(sentinels)]
        group = cls([master, *others], watching)

        async def knows(sentinel: SentinelServer) -> bool:
            found = await _watched_by(sentinel)
            return (int(found[b"num-other-sentinels"]), int(found[b"num-slaves"])) == (sentinels - 1, replicas)

        for sentinel in watching:
            await eventually(lambda sentinel=sentinel: knows(sentinel), bool, _FORM_SECONDS)  # type: ignore[misc]
        return group

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'{_LOOPBACK}:{each.port}' for each in self.sentinels)}/{SERVICE}/0"

    async def masters(self) -> list[RedisServer]:
        """All of them say so, and none of them is failing over: on a busy machine they do that by themselves."""

        async def said() -> set[tuple[bytes, bytes]]:
            states = [await _watched_by(sentinel) for sentinel in self.sentinels]
            return {(state[b"port"], state[b"flags"]) for state in states}

        [(port, _)] = await eventually(
            said, lambda said: len(said) == 1 and {flags for _, flags in said} == {b"master"}, _FAIL_OVER_SECONDS
        )
        return [self.at(int(port))]

    async def has_failed_over(self, killed: RedisServer) -> None:
        async def found() -> bool:
            address = await self.sentinels[0].raw("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
            master = self.at(int(address[1]))
            return master is not killed and not await master.is_replica()

        await eventually(found, bool, _FAIL_OVER_SECONDS)


async def _watched_by(sentinel: SentinelServer) -> dict[bytes, bytes]:
    """What it knows of the master."""
    [state] = await sentinel.raw("SENTINEL", "MASTERS")
    return dict(zip(state[::2], state[1::2], strict=True))


def _parsed(info: bytes) -> dict[str, Any]:
    pairs = (line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line)
    return {name: int(value) if value.isdecimal() else value for name, value in pairs}
