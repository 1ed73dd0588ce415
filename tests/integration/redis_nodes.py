"""Nodes of a Redis Cluster, in the process of the tests: they keep keys, and redirect as real nodes do.

A node owns slots, executes the lock's commands on its own keys, and says where the others are: MOVED, ASK for a key
that it lacks in a slot that migrates away, CLUSTERDOWN. It notes each command that it received.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby

import hiredis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from firstclaim.inbox.lock_commands import DROP, SWAP
from firstclaim.inbox.redis_cluster import RedisCluster
from firstclaim.inbox.redis_server import connect

HOST = "127.0.0.1"
_OK = b"+OK\r\n"


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """One node. `heard` has the commands on keys, by name and key; `writes` counts what came in one piece."""

    nodes: "Nodes"
    keys: dict[bytes, bytes] = field(default_factory=dict)
    heard: list[tuple[str, str]] = field(default_factory=list)
    tables_read: int = 0
    writes: int = 0
    error: bytes | None = None  # instead of each reply to a command on a key
    hangs_up: bool = False
    connections: list[asyncio.StreamWriter] = field(default_factory=list)
    port: int = 0
    listener: asyncio.Server | None = None

    @property
    def name(self) -> str:
        return f"{HOST}:{self.port}"

    async def listen(self) -> None:
        """Start, on the same port as before."""
        self.listener = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self.listener.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Listen no more, and lose all connections."""
        assert self.listener is not None
        self.listener.close()
        for connection in self.connections:
            connection.transport.abort()
        self.connections.clear()
        await self.listener.wait_closed()
        self.listener = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        commands, asking = hiredis.Reader(), False
        while chunk := await reader.read(65_536):
            self.writes += 1
            commands.feed(chunk)
            while (command := commands.gets()) is not False:
                name = command[0].decode().upper()
                if self.hangs_up and name not in ("CLIENT", "CLUSTER"):
                    self.heard.append((name, ""))
                    writer.transport.abort()
                    return
                writer.write(self._reply(name, command[1:], asking=asking))
                asking = name == "ASKING"
        writer.close()

    def _reply(self, name: str, arguments: Sequence[bytes], *, asking: bool) -> bytes:
        if name in ("CLIENT", "ASKING"):
            return _OK
        if name == "PING":
            return b"+PONG\r\n"
        if name == "CLUSTER":
            self.tables_read += 1
            return self.nodes.table()
        key = arguments[2] if name == "EVAL" else arguments[0]
        self.heard.append((name, key.decode()))
        return self.error or self.nodes.elsewhere(self, key, asking=asking) or self._execute(name, key, arguments)

    def _execute(self, name: str, key: bytes, arguments: Sequence[bytes]) -> bytes:
        now = self.keys.get(key)
        match name:
            case "SET" if now is None:
                self.keys[key] = arguments[1]
                return b"$-1\r\n"
            case "SET" | "GET":
                return b"$-1\r\n" if now is None else b"$%d\r\n%b\r\n" % (len(now), now)
            case "PTTL":
                return b":1000\r\n"
            case "DEL":
                return b":%d\r\n" % (self.keys.pop(key, None) is not None)
        script, keys, _, expected, *rest = arguments
        assert keys == b"1", "a script of a Cluster has one key"
        if script.decode() == SWAP and now == expected:
            self.keys[key] = rest[0]
            return b":1\r\n"
        if script.decode() == DROP and now in (expected, *rest):
            del self.keys[key]
            return b":1\r\n"
        return b":0\r\n"


@dataclass(slots=True, repr=False)
class Nodes:
    """Nodes that share the slots evenly; `owners` may be changed by the slot, and `migrating` says to which node."""

    nodes: list[Node] = field(default_factory=list)
    owners: dict[int, Node | None] = field(default_factory=dict)
    migrating: dict[int, Node] = field(default_factory=dict)
    shown: dict[int, Node | None] | None = None  # what the table says, if that is not true
    endpoint: bytes = HOST.encode()  # empty: nodes do not know their own addresses

    def of(self, key: str) -> Node:
        """The owner of a key's slot."""
        node = self.owners[key_slot(key.encode())]
        assert node is not None
        return node

    def key_of(self, node: Node, number: int = 0) -> str:
        """An event id whose key the node owns; another one for each `number`."""
        found = (f"evt_{each}" for each in range(10_000) if self.owners[key_slot(f"test:evt_{each}".encode())] is node)
        return [next(found) for _ in range(number + 1)][number]

    def move(self, old: Node, new: Node) -> None:
        """All slots of `old` are the other's."""
        self.owners = {slot: new if node is old else node for slot, node in self.owners.items()}

    def elsewhere(self, node: Node, key: bytes, *, asking: bool) -> bytes | None:
        """The error of `node` if the key is not its own, or not here any more."""
        slot = key_slot(key)
        owner, target = self.owners[slot], self.migrating.get(slot)
        if owner is node and target is not None and key not in node.keys:
            return b"-ASK %d %b:%d\r\n" % (slot, self.endpoint, target.port)
        if owner is node or (target is node and asking):
            return None
        if owner is None:
            return b"-CLUSTERDOWN Hash slot not served\r\n"
        return b"-MOVED %d %b:%d\r\n" % (slot, self.endpoint, owner.port)

    def table(self) -> bytes:
        """The reply to CLUSTER SLOTS."""
        owners = self.owners if self.shown is None else self.shown
        ranges = [(node, list(slots)) for node, slots in groupby(range(REDIS_CLUSTER_HASH_SLOTS), owners.__getitem__)]
        rows = [
            b"*3\r\n:%d\r\n:%d\r\n*3\r\n$%d\r\n%b\r\n:%d\r\n$2\r\nid\r\n"
            % (slots[0], slots[-1], len(self.endpoint), self.endpoint, node.port)
            for node, slots in ranges
            if node is not None
        ]
        return b"*%d\r\n%b" % (len(rows), b"".join(rows))


@asynccontextmanager
async def running_nodes(count: int = 3) -> AsyncIterator[Nodes]:
    """So many masters, which listen."""
    nodes = Nodes()
    nodes.nodes += [Node(nodes) for _ in range(count)]
    for node in nodes.nodes:
        await node.listen()
    share = REDIS_CLUSTER_HASH_SLOTS // count + 1
    nodes.owners |= {slot: nodes.nodes[slot // share] for slot in range(REDIS_CLUSTER_HASH_SLOTS)}
    try:
        yield nodes
    finally:
        for node in nodes.nodes:
            if node.listener is not None:
                await node.die()


def cluster_of(nodes: Nodes, *, breaker_seconds: float = 10, timeout_seconds: float = 2) -> RedisCluster:
    """The client, which knows all nodes as seeds."""
    seeds = [(HOST, node.port) for node in nodes.nodes]
    url = f"redis+cluster://{HOST}"
    return RedisCluster(
        seeds,
        lambda host: connect(url, timeout_seconds=timeout_seconds, host=host),
        breaker_seconds=breaker_seconds,
    )
