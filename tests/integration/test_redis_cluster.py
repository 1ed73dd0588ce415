"""The lock on a Cluster: which node gets each command, and what an outage of one stops. Real nodes: tests/chaos."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
from redis.crc import key_slot

from firstclaim.errors import LockUnavailable
from firstclaim.inbox import redis_cluster, redis_server
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.inbox.redis_cluster import RedisCluster
from firstclaim.postgres.epoch import Epoch
from tests.integration.hand_clock import HandClock
from tests.integration.redis_nodes import HOST, Nodes, cluster_of, running_nodes
from tests.integration.world import until

TOKEN, EPOCH = "0123456789abcdef", "00aa11bb22cc33dd"
BREAKER_SECONDS = 10.0
PREFIX = "test:"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """The clock of the breakers, and of the table."""
    return HandClock.installed(monkeypatch, redis_server, redis_cluster)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    """Three masters."""
    async with running_nodes() as nodes:
        yield nodes


@pytest.fixture
async def cluster(nodes: Nodes, clock: HandClock) -> AsyncIterator[RedisCluster]:
    cluster = cluster_of(nodes, breaker_seconds=BREAKER_SECONDS)
    yield cluster
    await cluster.close()


@pytest.fixture
def lock(cluster: RedisCluster) -> Lock:
    return Lock(cluster, prefix=PREFIX, lock_ttl_seconds=20, marker_ttl_seconds=3600)


async def acquired(lock: Lock, event_id: str) -> LockReply:
    return await lock.acquire(event_id, TOKEN, EPOCH)


def is_away(lock: Lock) -> bool:
    """Whether recovery takes nothing."""
    return lock.unreachable


async def known(lock: Lock, nodes: Nodes) -> None:
    """Every master has served a command, so the table is known."""
    for node in nodes.nodes:
        assert await acquired(lock, nodes.key_of(node, 99)) is LockReply.HELD
        node.heard.clear()


async def table_read(cluster: RedisCluster) -> None:
    """The table is not being read any more."""

    async def read() -> bool:
        return cluster._reading is None

    await until(read)


# -- routing ------------------------------------------------------------------------------------------


async def test_each_key_goes_to_its_master(nodes: Nodes, lock: Lock) -> None:
    """One table for all, and no redirection: each master gets the commands of its own slots, and no others."""
    ids = [f"evt_{number}" for number in range(60)]
    assert set(await asyncio.gather(*(acquired(lock, event_id) for event_id in ids))) == {LockReply.HELD}
    heard = {node: [key for _, key in node.heard] for node in nodes.nodes}
    assert sorted(key for keys in heard.values() for key in keys) == sorted(PREFIX + event_id for event_id in ids)
    assert all(keys and all(nodes.of(key) is node for key in keys) for node, keys in heard.items())
    assert sum(node.tables_read for node in nodes.nodes) <= len(nodes.nodes)  # all seeds are asked at once, once


async def test_the_commands_of_a_batch_go_to_each_master_together(nodes: Nodes, lock: Lock) -> None:
    """The markers of a batch: scripts of one key each, in one write for each master."""
    tokens = {f"evt_{number}": TOKEN for number in range(60)}
    await asyncio.gather(*(acquired(lock, event_id) for event_id in tokens))
    for node in nodes.nodes:
        node.heard.clear()
        node.writes = 0
    await lock.mark_all_recorded(tokens, EPOCH)
    assert [node.writes for node in nodes.nodes] == [1, 1, 1]
    assert {name for node in nodes.nodes for name, _ in node.heard} == {"EVAL"}
    values = {key: value for node in nodes.nodes for key, value in node.keys.items()}
    assert values == {(PREFIX + event_id).encode(): f"recorded:{EPOCH}".encode() for event_id in tokens}


async def test_a_moved_slot(nodes: Nodes, lock: Lock, cluster: RedisCluster, clock: HandClock) -> None:
    """MOVED is followed, is remembered for its slot, and has the whole table read again."""
    await known(lock, nodes)
    old, new, other = nodes.nodes
    first, second = nodes.key_of(old, 1), nodes.key_of(old, 2)
    nodes.move(old, new)
    clock.now += BREAKER_SECONDS
    assert await acquired(lock, first) is LockReply.HELD
    assert [len(node.heard) for node in nodes.nodes] == [1, 1, 0]
    assert await lock.acquire(first, TOKEN, EPOCH) is LockReply.HELD  # our own lock
    assert [len(node.heard) for node in nodes.nodes] == [1, 2, 0]
    await table_read(cluster)
    assert cluster.masters == [cluster._nodes[HOST, new.port], cluster._nodes[HOST, other.port]]
    assert await acquired(lock, second) is LockReply.HELD
    assert [len(node.heard) for node in nodes.nodes] == [1, 3, 0]


async def test_a_key_that_migrates(nodes: Nodes, lock: Lock, cluster: RedisCluster) -> None:
    """ASK: the command right after ASKING, among others, is the key's; a key that is still here is locked here."""
    await known(lock, nodes)
    old, new, _ = nodes.nodes
    event_id = nodes.key_of(old, 1)
    slot = key_slot((PREFIX + event_id).encode())
    nodes.migrating[slot] = new
    beside = [nodes.key_of(new, number) for number in range(5)]
    replies = await asyncio.gather(*(acquired(lock, each) for each in [event_id, *beside]))
    assert set(replies) == {LockReply.HELD}
    assert (PREFIX + event_id).encode() in new.keys
    await lock.mark_recorded(event_id, TOKEN, EPOCH)
    assert new.keys[(PREFIX + event_id).encode()] == f"recorded:{EPOCH}".encode()
    assert await acquired(lock, event_id) is LockReply.RECORDED
    assert cluster._by_slot[slot] is cluster._nodes[HOST, old.port]  # only the end of the migration moves the slot


async def test_redirected_for_ever(nodes: Nodes, lock: Lock) -> None:
    """Nodes that do not agree who has a slot: a few sends, and the event is recorded without its lock."""
    await known(lock, nodes)
    one, two, _ = nodes.nodes
    event_id = nodes.key_of(one, 1)
    slot = key_slot((PREFIX + event_id).encode())
    one.error, two.error = (b"-MOVED %d %b:%d\r\n" % (slot, HOST.encode(), port) for port in (two.port, one.port))
    assert await acquired(lock, event_id) is LockReply.UNREACHABLE
    assert len(one.heard) + len(two.heard) == 4
    assert not lock.unreachable


async def test_nodes_that_do_not_know_their_address(nodes: Nodes, lock: Lock, clock: HandClock) -> None:
    """An empty host in the table and in MOVED is that of the node which says so."""
    nodes.endpoint = b""
    await known(lock, nodes)
    old, new, _ = nodes.nodes
    event_id = nodes.key_of(old, 1)
    nodes.move(old, new)
    assert await acquired(lock, event_id) is LockReply.HELD


async def test_a_prefix_with_a_hash_tag(nodes: Nodes, cluster: RedisCluster) -> None:
    """All keys are in one slot then, and one master has them."""
    lock = Lock(cluster, prefix="{shop}:", lock_ttl_seconds=20, marker_ttl_seconds=3600)
    assert {await acquired(lock, f"evt_{number}") for number in range(9)} == {LockReply.HELD}
    assert sorted(len(node.heard) for node in nodes.nodes) == [0, 0, 9]


# -- outages ------------------------------------------------------------------------------------------


async def test_a_lost_reply_is_not_asked_for_again(nodes: Nodes, lock: Lock) -> None:
    """The command may have been executed: it is sent to no node a second time."""
    await known(lock, nodes)
    failing = nodes.nodes[0]
    failing.hangs_up = True
    assert await acquired(lock, nodes.key_of(failing, 1)) is LockReply.UNREACHABLE
    assert [len(node.heard) for node in nodes.nodes] == [1, 0, 0]


@pytest.mark.parametrize("fault", ["dead", b"-CLUSTERDOWN The cluster is down\r\n", b"-NOPERM no\r\n"])
async def test_the_keys_of_other_masters_go_on(nodes: Nodes, lock: Lock, fault: str | bytes) -> None:
    """One master is dead, or refuses: its breaker opens for its own keys, and Redis is not unreachable."""
    await known(lock, nodes)
    failing, *others = nodes.nodes
    if isinstance(fault, bytes):
        failing.error = fault
    else:
        await failing.die()
    for number in range(1, 5):
        assert await acquired(lock, nodes.key_of(failing, number)) is LockReply.UNREACHABLE
        assert {await acquired(lock, nodes.key_of(node, number)) for node in others} == {LockReply.HELD}
    assert len(failing.heard) <= 1
    assert not lock.unreachable


async def test_all_masters_away_are_an_outage(nodes: Nodes, lock: Lock, clock: HandClock) -> None:
    """Each breaker has a probe of its own; while all are open, recovery takes nothing."""
    await known(lock, nodes)
    for node in nodes.nodes:
        node.error = b"-CLUSTERDOWN The cluster is down\r\n"
        assert not is_away(lock)
        assert await acquired(lock, nodes.key_of(node, 1)) is LockReply.UNREACHABLE
    assert is_away(lock)
    for node in nodes.nodes:
        node.error = None
    clock.now += BREAKER_SECONDS
    assert not is_away(lock)
    assert {await acquired(lock, nodes.key_of(node, 2)) for node in nodes.nodes} == {LockReply.HELD}


async def test_a_slot_that_nobody_serves(nodes: Nodes, lock: Lock, cluster: RedisCluster, clock: HandClock) -> None:
    """Its keys alone are unreachable: by what a master says, and then by the table, without a command."""
    await known(lock, nodes)
    master = nodes.nodes[0]
    event_id, other = nodes.key_of(master, 1), nodes.key_of(master, 2)
    slot = key_slot((PREFIX + event_id).encode())
    nodes.owners[slot] = None
    clock.now += BREAKER_SECONDS
    assert await acquired(lock, event_id) is LockReply.UNREACHABLE
    assert await acquired(lock, other) is LockReply.HELD
    await table_read(cluster)
    assert cluster.unserved_slots == 1
    assert await acquired(lock, event_id) is LockReply.UNREACHABLE
    assert [key for _, key in master.heard] == [PREFIX + event_id, PREFIX + other]
    nodes.owners[slot] = master
    clock.now += BREAKER_SECONDS
    assert await acquired(lock, event_id) is LockReply.HELD


async def test_a_promoted_replica(nodes: Nodes, lock: Lock, cluster: RedisCluster, clock: HandClock) -> None:
    """The master is dead and another node has its slots: after a window at most, the table says so."""
    await known(lock, nodes)
    dead, promoted, _ = nodes.nodes
    ids = [nodes.key_of(dead, number) for number in range(1, 4)]
    await dead.die()
    assert await acquired(lock, ids[0]) is LockReply.UNREACHABLE
    await table_read(cluster)
    nodes.move(dead, promoted)
    assert await acquired(lock, ids[1]) is LockReply.UNREACHABLE  # the table was read a moment ago
    clock.now += BREAKER_SECONDS
    assert await acquired(lock, ids[1]) is LockReply.UNREACHABLE  # the probe of the dead one
    await table_read(cluster)
    assert await acquired(lock, ids[2]) is LockReply.HELD
    assert (PREFIX + ids[2]).encode() in promoted.keys
    assert (HOST, dead.port) not in cluster._nodes  # its connection is closed


async def test_no_node_answers(nodes: Nodes, lock: Lock, cluster: RedisCluster, clock: HandClock) -> None:
    """Started before its Cluster: an outage, in which the nodes are asked once per window; then all is well."""
    for node in nodes.nodes:
        await node.die()
    assert await acquired(lock, "evt_1") is LockReply.UNREACHABLE
    assert is_away(lock)
    with pytest.raises(LockUnavailable, match="no node"):
        await lock.ping()
    for node in nodes.nodes:
        await node.listen()
    assert await acquired(lock, "evt_1") is LockReply.UNREACHABLE
    clock.now += BREAKER_SECONDS
    assert not is_away(lock)
    assert await acquired(lock, "evt_1") is LockReply.HELD


async def test_the_first_seed_may_be_dead(nodes: Nodes, lock: Lock) -> None:
    """Any of the nodes that the address names is enough."""
    dead, alive, _ = nodes.nodes
    nodes.move(dead, alive)
    await dead.die()
    assert await acquired(lock, "evt_1") is LockReply.HELD


async def test_a_node_without_a_table_is_passed_over(
    nodes: Nodes, lock: Lock, clock: HandClock, cluster: RedisCluster
) -> None:
    """A table of no slots, of a node that has been reset, replaces nothing."""
    await known(lock, nodes)
    nodes.shown = dict.fromkeys(nodes.owners)
    nodes.nodes[0].error = b"-CLUSTERDOWN The cluster is down\r\n"
    clock.now += BREAKER_SECONDS
    assert await acquired(lock, nodes.key_of(nodes.nodes[0], 1)) is LockReply.UNREACHABLE
    await table_read(cluster)
    assert await acquired(lock, nodes.key_of(nodes.nodes[1], 1)) is LockReply.HELD


async def test_after_a_refused_script_the_probe_is_in_the_same_slot(nodes: Nodes, lock: Lock, clock: HandClock) -> None:
    """The probe tries every command on a key that the master has: elsewhere it would only be redirected."""
    await known(lock, nodes)
    master = nodes.nodes[0]
    event_id = nodes.key_of(master, 1)
    assert await acquired(lock, event_id) is LockReply.HELD
    master.error = b"-NOPERM no\r\n"
    await lock.mark_recorded(event_id, TOKEN, EPOCH)
    master.error = None
    master.heard.clear()
    clock.now += BREAKER_SECONDS
    assert await acquired(lock, nodes.key_of(master, 2)) is LockReply.HELD
    assert [name for name, _ in master.heard] == ["SET", "GET", "PTTL", "DEL", "SET", "EVAL", "EVAL", "SET"]
    # Slots, and not masters: another slot may be the same master's by chance.
    assert len({key_slot(key.encode()) for _, key in master.heard}) == 1


async def test_recovery_leaves_out_what_a_dead_master_has(nodes: Nodes, lock: Lock) -> None:
    """Due events of a master that is down are left out of the next looks: else no round would find any others."""

    async def take_over(_: Sequence[str]) -> list[Claim]:
        return []

    claims = Claims(lock, cast(Ledger, SimpleNamespace(take_over=take_over)), Epoch(5), lock_ttl_seconds=20)
    await known(lock, nodes)
    dead, alive, _ = nodes.nodes
    await dead.die()
    missed, locked = nodes.key_of(dead, 1), nodes.key_of(alive, 1)
    assert await claims.recover([missed, locked]) == ([], {missed: 2, locked: 20})
    assert (PREFIX + locked).encode() not in alive.keys


async def test_ping_names_what_is_missing(nodes: Nodes, lock: Lock, clock: HandClock) -> None:
    """/readyz shows the masters that do not answer or refuse, and slots without a master."""
    await lock.ping()
    dead, refusing, _ = nodes.nodes
    await dead.die()
    refusing.error = b"-CLUSTERDOWN The cluster is down\r\n"
    assert await acquired(lock, nodes.key_of(refusing, 1)) is LockReply.UNREACHABLE
    with pytest.raises(LockUnavailable, match=f"^2 of 3 masters unreachable: {dead.name}, {refusing.name}$"):
        await lock.ping()
    refusing.error = None
    nodes.move(dead, refusing)
    nodes.owners[7] = None
    clock.now += BREAKER_SECONDS
    with pytest.raises(LockUnavailable, match="1 slots have no master"):
        await lock.ping()
