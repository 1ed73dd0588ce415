"""The masters of a Redis Cluster, and which of them has a key.

Guarantees: a command goes to the master of its key's slot, over that server's one connection and behind its own
breaker, so an outage of one master stops no key of the others. Every command has one key; those of one turn of the
event loop are one batch per server. A command is sent again only where a server has said that it did not execute it
(MOVED, ASK): any other repetition could find our own lock.

The table of the slots is read at the first command, and again when a server redirects, fails or refuses: at most once
per breaker window, and in the background, so that no delivery waits for it. Between two readings a redirection corrects
its own slot. While a slot has no master, its keys alone are unreachable.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

import hiredis
import structlog
from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError, TryAgainError

from firstclaim.errors import LockUnavailable
from firstclaim.inbox.lock import LockServers
from firstclaim.inbox.lock_commands import key_of
from firstclaim.inbox.redis_server import UNREACHABLE_ERRORS, AnsweredError, RedisServer, connect
from firstclaim.observability import metrics
from firstclaim.urls.redis import RedisAddress, RedisKind

log = structlog.get_logger(__name__)

Host = tuple[str, int]
Range = tuple[int, int, list[Host]]  # the first slot, the last one, the master and its replicas

SLOTS = REDIS_CLUSTER_HASH_SLOTS

_MAX_SENDS = 4  # two of them for a slot that was moved and a key that migrates again
_ASKING = hiredis.pack_command(("ASKING",))
_CLUSTER_SLOTS = hiredis.pack_command(("CLUSTER", "SLOTS"))  # type: ignore[arg-type]


def lock_servers(url: str, *, timeout_seconds: float, breaker_seconds: float) -> LockServers:
    """The servers of an address that `redis_url` has converted; opens nothing yet."""
    address = RedisAddress.parse(url)
    connect_to = partial(connect, url, timeout_seconds=timeout_seconds)
    if address.kind is RedisKind.CLUSTER:
        return RedisCluster(address.hosts, lambda host: connect_to(host=host), breaker_seconds=breaker_seconds)
    return RedisServer(connect_to(), breaker_seconds=breaker_seconds)


class RedisCluster:
    """All masters. `seeds` are some of the nodes; `connect` makes a client for a node."""

    several_keys = False

    def __init__(self, seeds: Sequence[Host], connect: Callable[[Host], Redis], *, breaker_seconds: float) -> None:
        self._seeds = seeds
        self._connect = connect
        self._breaker_seconds = breaker_seconds
        self._nodes: dict[Host, ClusterNode] = {}  # those that there is a client for
        self._known: Sequence[Host] = ()  # all nodes of the last table, with the replicas
        self._by_slot: list[ClusterNode | None] = [None] * SLOTS
        self.masters: list[ClusterNode] = []
        self._reading: asyncio.Task[None] | None = None
        self._next_read_at = 0.0
        self._lost = False  # no node answered, and no table is known
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def unreachable(self) -> bool:
        """Whether no command is sent, because all masters failed a moment ago, or no table is known."""
        if not self.masters:
            return self._reading is None and time.monotonic() < self._next_read_at
        return all(node.unreachable for node in self.masters)

    @property
    def unserved_slots(self) -> int:
        """The number of slots without a master."""
        return self._by_slot.count(None)

    async def call(self, name: str, *arguments: str | bytes | int) -> Any:
        """The reply to a command of the lock, which has one key. Raises `LockUnavailable`."""
        slot = key_slot(key_of(name, arguments))
        node = self._by_slot[slot] or await self._find(slot)
        send = node.call
        for _ in range(_MAX_SENDS):
            try:
                return await send(name, *arguments)
            except RedirectedError as redirected:
                node = self._node(redirected.host)
                send = node.ask
                if not redirected.only_now:
                    send = node.call
                    self._by_slot[slot] = node
                    self._read_soon()
            except LockUnavailable:
                self._read_soon()
                raise
        raise LockUnavailable(f"{name} is redirected too often")

    async def ping(self) -> None:
        """Whether every master answers, and every slot has one. Raises `LockUnavailable`, which names what is missing.

        A master that refused a command a moment ago counts as one that does not answer.
        """
        await self.read()
        if not self.masters:
            raise LockUnavailable("no node of the Cluster answers")
        masters = list(self.masters)
        pings = await asyncio.gather(*(node.ping() for node in masters), return_exceptions=True)
        missing = [node.name for node, ping in zip(masters, pings, strict=True) if ping is not None or node.unreachable]
        if missing:
            raise LockUnavailable(f"{len(missing)} of {len(masters)} masters unreachable: {', '.join(missing)}")
        if self.unserved_slots:
            raise LockUnavailable(f"{self.unserved_slots} slots have no master")

    async def close(self) -> None:
        """Close the connections."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        await asyncio.gather(*(node.close() for node in self._nodes.values()), *self._closing)

    # -- the table --------------------------------------------------------------------------------------

    async def _find(self, slot: int) -> "ClusterNode":
        await self.read()
        node = self._by_slot[slot]
        if node is None:
            raise LockUnavailable("the key's slot has no master")
        return node

    async def read(self) -> None:
        """Read the table, unless it was read a moment ago. A failure leaves it as it is."""
        self._read_soon()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    def _read_soon(self) -> None:
        if self._reading is None and time.monotonic() >= self._next_read_at:
            self._reading = asyncio.create_task(self._read(), name="redis_cluster")

    async def _read(self) -> None:
        working = [node.host for node in self.masters if not node.unreachable]
        random.shuffle(working)
        others = dict.fromkeys([*working[1:], *self._known, *self._seeds])
        try:
            # First the node that is most likely to answer. Then all others at once: each may take a timeout.
            if not await self._read_from(working[:1]) and not await self._read_from(others) and not self.masters:
                self._note_lost()
        finally:
            self._next_read_at = time.monotonic() + self._breaker_seconds
            self._reading = None

    async def _read_from(self, hosts: Iterable[Host]) -> bool:
        asking = [asyncio.create_task(self._node(host).read_slots()) for host in hosts]
        try:
            for answer in asyncio.as_completed(asking):
                if slots := await answer:
                    self._take(slots)
                    return True
        finally:
            for task in asking:
                task.cancel()
        return False

    def _take(self, slots: Sequence[Range]) -> None:
        """Use a new table. Nodes that are no masters any more are closed, unless they still have commands."""
        self._by_slot = [None] * SLOTS
        for first, last, hosts in slots:
            self._by_slot[first : last + 1] = [self._node(hosts[0])] * (last + 1 - first)
        before, self.masters = self.masters, list(dict.fromkeys(self._node(hosts[0]) for _, _, hosts in slots))
        self._known = [host for _, _, hosts in slots for host in hosts]
        for host in [host for host, node in self._nodes.items() if node not in self.masters and node.idle]:
            self._spawn(self._nodes.pop(host).close())
        if self._lost:
            log.warning("redis_back")
        self._lost = False
        if before and set(before) != set(self.masters):
            log.info("redis_masters_changed", masters=[node.name for node in self.masters])

    def _note_lost(self) -> None:
        if not self._lost:
            metrics.redis_outages.inc()
            pause = self._breaker_seconds
            log.warning("redis_away", error="no node answers", command="CLUSTER", retry_every_seconds=pause)
        self._lost = True

    def _node(self, host: Host) -> "ClusterNode":
        if host not in self._nodes:
            self._nodes[host] = ClusterNode(host, self._connect(host), breaker_seconds=self._breaker_seconds)
        return self._nodes[host]

    def _spawn(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class ClusterNode(RedisServer):
    """One node. It raises what it says of a key's place, and such a reply opens no breaker."""

    several_keys = False

    def __init__(self, host: Host, redis: Redis, *, breaker_seconds: float) -> None:
        super().__init__(redis, breaker_seconds=breaker_seconds, name=f"{host[0]}:{host[1]}")
        self.host = host

    @property
    def idle(self) -> bool:
        """Whether no command waits for its reply."""
        return self._commands.idle

    async def ask(self, name: str, *arguments: str | bytes | int) -> Any:
        """The same as `call`, for a key that migrates here: only the command right after ASKING is accepted."""
        if self._tripped:
            raise LockUnavailable("breaker open")
        self._commands.call(_ASKING).add_done_callback(lambda asking: asking.exception())
        return await self._execute(name, *arguments)

    async def slots(self) -> list[Range]:
        """The table of the slots. Raises one of `UNREACHABLE_ERRORS`."""
        found = await self._commands.call(_CLUSTER_SLOTS)
        try:
            return [(int(first), int(last), list(map(self._host, nodes))) for first, last, *nodes in found]
        except (TypeError, AttributeError) as error:
            raise ValueError("no table of slots") from error

    def _host(self, node: Sequence[Any]) -> Host:
        return node[0].decode() if node[0] else self.host[0], int(node[1])

    async def read_slots(self) -> list[Range]:
        """The same; empty if the node does not answer, or is in no Cluster."""
        try:
            return await self.slots()
        except UNREACHABLE_ERRORS:
            return []

    def _refused(self, error: ResponseError, command: str) -> None:
        if isinstance(error, AskError):  # also MovedError
            host = error.host or self.host[0]  # an empty one is that of the node which says so
            raise RedirectedError((host, error.port), only_now=not isinstance(error, MovedError)) from error
        if isinstance(error, TryAgainError) or (isinstance(error, ClusterDownError) and "slot" in str(error)):
            raise AnsweredError(f"{command} is refused: {error}") from error
        super()._refused(error, command)


class RedirectedError(AnsweredError):
    """Another node has the key: until further notice (MOVED), or for this command only (ASK)."""

    def __init__(self, host: Host, *, only_now: bool) -> None:
        super().__init__("redirected")
        self.host = host
        self.only_now = only_now
