"""The check of Redis before the start, and what REDIS_URL leads to: one server, a Sentinel's master, or a Cluster.

Guarantees: an address of another kind than the servers is fatal, and the kind that they are is named: one server, a
Sentinel, a node of a Cluster. So is a service that the Sentinels do not know. A Sentinel or a node that cannot be
reached is a warning as long as another one answers. Each master is checked as a single server is: see
`redis_server_check.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from itertools import count
from typing import cast
from urllib.parse import SplitResult, parse_qsl, urlsplit

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ResponseError

from firstclaim.errors import ConfigurationError
from firstclaim.inbox.redis_cluster import SLOTS, ClusterNode, Host, Range
from firstclaim.inbox.redis_server import RedisServer, connect, sentinels
from firstclaim.server.check import Check, Verdict, fail, ok, warn
from firstclaim.server.redis_server_check import FAILURES, check_server, explain, log_in
from firstclaim.settings import Settings
from firstclaim.urls.parts import split, unreadable_file
from firstclaim.urls.redis import TLS_FILES, RedisAddress, RedisKind

_KEYS_TRIED = 4  # are in one slot only if it is that of a hash tag


async def check_redis(settings: Settings) -> AsyncIterator[Check]:
    """Check the files for TLS, what the address leads to, and each server that would hold locks."""
    url = settings.redis_url.get_secret_value() if settings.redis_url else ""
    if fault := unreadable_file(dict(parse_qsl(split(url).query)), TLS_FILES):
        yield fail("redis", f"REDIS_URL: {fault}", exit_code=ConfigurationError.exit_code)
        return
    address = RedisAddress.parse(url)
    check = {RedisKind.SENTINEL: _check_service, RedisKind.CLUSTER: _check_cluster}.get(address.kind, _check_single)
    async for each in check(url, address, settings):
        yield each


def _timeout(settings: Settings) -> float:
    return max(1.0, settings.redis_timeout_seconds)


async def _check_single(url: str, address: RedisAddress, settings: Settings) -> AsyncIterator[Check]:
    server = RedisServer(connect(url, timeout_seconds=_timeout(settings)), breaker_seconds=1)
    async for check in check_server(server, urlsplit(address.server), f"{settings.redis_prefix}check/"):
        yield check


# -- Sentinel -----------------------------------------------------------------------------------------


async def _check_service(url: str, address: RedisAddress, settings: Settings) -> AsyncIterator[Check]:
    """Ask every Sentinel for the master, then check the master."""
    timeout = _timeout(settings)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client) for client in sentinels(address, timeout_seconds=timeout)]
        found = await asyncio.gather(
            *(_master_of(client, address.service) for client in clients), return_exceptions=True
        )
        names = await asyncio.gather(*(_services(client) for client in clients))
    masters = [each for each in found if isinstance(each, tuple)]
    failed = [
        await _sentinel_failed(each, _place(address, host))
        for host, each in zip(address.hosts, found, strict=True)
        if isinstance(each, BaseException)
    ]
    for check in _of_many(failed, reached=bool(masters) or None in found, what="Sentinel"):
        yield check
    if masters:
        server = RedisServer(connect(url, timeout_seconds=timeout), breaker_seconds=1)
        host, port = masters[0]
        place = _place(address, (host, port))
        kind = f"the master at {host}:{port} of {len(masters)} of {len(clients)} Sentinels"
        async for check in check_server(server, place, f"{settings.redis_prefix}check/", kind=kind):
            yield check
    elif None in found:
        known = sorted({name for each in names for name in each})
        have = f"they know {', '.join(known)}" if known else "they know none"
        yield fail("redis", f"the Sentinels do not know the service that REDIS_URL names; {have}")


async def _master_of(sentinel: Redis, service: str) -> Host | None:
    found = cast(tuple[bytes, int] | None, await sentinel.sentinel_get_master_addr_by_name(service))
    return (found[0].decode(), found[1]) if found else None


async def _services(sentinel: Redis) -> Sequence[str]:
    try:
        return list(cast(dict[str, object], await sentinel.sentinel_masters()))
    except FAILURES:
        return ()


async def _sentinel_failed(error: BaseException, place: SplitResult) -> Check:
    if isinstance(error, ResponseError) and "unknown command" in str(error).lower():
        return fail("redis", "is a Redis server and no Sentinel; expected its own address, redis:// in REDIS_URL")
    if not isinstance(error, FAILURES):
        raise error
    return await explain(error, place, login="sentinel_username and sentinel_password")


# -- Cluster ------------------------------------------------------------------------------------------


async def _check_cluster(url: str, address: RedisAddress, settings: Settings) -> AsyncIterator[Check]:
    """Read the table of the slots from each node that is named, then check each master."""
    found = await asyncio.gather(
        *(_table(_node(url, host, settings)) for host in address.hosts), return_exceptions=True
    )
    failed = [
        await _node_failed(each, _place(address, host))
        for host, each in zip(address.hosts, found, strict=True)
        if isinstance(each, BaseException)
    ]
    tables = [each for each in found if not isinstance(each, BaseException)]
    for check in _of_many(failed, reached=bool(tables), what="node"):
        yield check
    if not tables:
        return
    table = max(tables, key=_served)
    if _served(table) < SLOTS:
        detail = f"{SLOTS - _served(table)} of {SLOTS} slots have no master: events with these are not dispatched"
        yield fail("redis", detail, fatal=False)
    async for check in _check_masters(url, address, settings, table):
        yield check


async def _check_masters(
    url: str, address: RedisAddress, settings: Settings, table: Sequence[Range]
) -> AsyncIterator[Check]:
    passed: list[str] = []
    masters = list(dict.fromkeys(hosts[0] for _, _, hosts in table))
    for host in masters:
        key = _key_at(host, table, f"{settings.redis_prefix}check/")
        if key is None:
            continue
        async for check in check_server(_node(url, host, settings), _place(address, host), key, kind=""):
            if check.verdict is Verdict.OK:
                passed.append(check.detail)
            else:
                yield _prefixed(check, f"master {host[0]}:{host[1]}")
    if passed:
        yield ok("redis", f"{', '.join(dict.fromkeys(passed))}: a Cluster of {len(masters)} masters")


def _node(url: str, host: Host, settings: Settings) -> ClusterNode:
    return ClusterNode(host, connect(url, timeout_seconds=_timeout(settings), host=host), breaker_seconds=1)


async def _table(node: ClusterNode) -> list[Range]:
    try:
        await log_in(node.client)
        return await node.slots()
    finally:
        await node.close()


def _served(table: Sequence[Range]) -> int:
    return sum(last + 1 - first for first, last, _ in table)


def _key_at(host: Host, table: Sequence[Range], prefix: str) -> str | None:
    """A key in a slot of this master; None if another one has all keys, because the prefix has a hash tag."""
    own = {slot for first, last, hosts in table if hosts[0] == host for slot in range(first, last + 1)}
    if len({_slot(f"{prefix}{number}/") for number in range(_KEYS_TRIED)}) == 1 and _slot(prefix) not in own:
        return None
    return next(key for number in count() if _slot(key := f"{prefix}{number}/") in own)


def _slot(key: str) -> int:
    return int(key_slot(key.encode()))


async def _node_failed(error: BaseException, place: SplitResult) -> Check:
    if isinstance(error, ResponseError) and "cluster support disabled" in str(error):
        return fail("redis", "is a single server and no node of a Cluster; expected redis:// in REDIS_URL")
    if not isinstance(error, FAILURES):
        raise error
    return await explain(error, place)


# -- both ---------------------------------------------------------------------------------------------


def _place(address: RedisAddress, host: Host) -> SplitResult:
    """The address of one server, without a login."""
    name = f"[{host[0]}]" if ":" in host[0] else host[0]
    return SplitResult(urlsplit(address.server).scheme, f"{name}:{host[1]}", "", "", "")


def _of_many(failed: Sequence[Check], *, reached: bool, what: str) -> list[Check]:
    """The failed checks of several servers: warnings if another one answered; else the worst of them."""
    if reached:
        return [warn("redis", f"a {what} of REDIS_URL: {check.detail}") for check in failed]
    return [_prefixed(max(failed, key=lambda check: check.fatal), f"a {what} of REDIS_URL")]


def _prefixed(check: Check, place: str) -> Check:
    return Check(check.name, check.verdict, f"{place}: {check.detail}", check.fatal, check.exit_code)
