"""The lock: one table of replies, on a real server; then every way Redis can be away."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
from redis.asyncio import Redis

from firstclaim.errors import LockUnavailable
from firstclaim.inbox import redis_server
from firstclaim.inbox.lock import Lock, LockReply
from firstclaim.inbox.lock_token import new_token
from firstclaim.inbox.redis_server import RedisServer, connect
from tests.integration.hand_clock import HandClock
from tests.integration.world import until
from tests.load.markers import write_markers
from tests.stores import Stores, redis_user

ID, TOKEN, EPOCH = "evt_1", "0123456789abcdef", "00aa11bb22cc33dd"
LOCK_TTL_MS, MARKER_TTL_MS = 20_000, 3_600_000
BREAKER_SECONDS = 10.0

OURS = f"claimed:{TOKEN}".encode()
THEIRS = b"claimed:fedcba9876543210"
RECORDED = f"recorded:{EPOCH}".encode()
OTHER_EPOCH = b"recorded:ffffffffffffffff"


_made: list[Lock] = []


@pytest.fixture
async def redis(stores: Stores) -> AsyncIterator[Redis]:
    """The client that the lock uses."""
    async with connect(stores.redis_url, timeout_seconds=2) as client:
        yield client


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Every lock that a test made."""
    yield
    while _made:
        await _made.pop().close()


@pytest.fixture
def lock(redis: Redis, redis_prefix: str) -> Lock:
    return make(redis, redis_prefix)


@pytest.fixture
def key(redis_prefix: str) -> str:
    return redis_prefix + ID


def make(redis: Redis, prefix: str = "test:", *, breaker_seconds: float = BREAKER_SECONDS) -> Lock:
    lock = Lock(
        RedisServer(redis, breaker_seconds=breaker_seconds),
        prefix=prefix,
        lock_ttl_seconds=LOCK_TTL_MS / 1000,
        marker_ttl_seconds=MARKER_TTL_MS / 1000,
    )
    _made.append(lock)
    return lock


async def has_ttl(redis: Redis, key: str, milliseconds: int) -> bool:
    """Whether the key was given that life a moment ago."""
    left: int = await redis.pttl(key)
    return milliseconds - 5000 < left <= milliseconds


@pytest.fixture
def commands(lock: Lock) -> list[str]:
    """The name of every command that the lock sends, from here on."""
    sent: list[str] = []

    async def note(name: str) -> None:
        sent.append(name)

    before_each_command(lock, note)
    return sent


def before(lock: Lock, command: str, act: Callable[[], Awaitable[object]]) -> None:
    """Have `act` happen in Redis before each `command`."""

    async def act_first(name: str) -> None:
        if name == command:
            await act()

    before_each_command(lock, act_first)


def before_each_command(lock: Lock, act: Callable[[str], Awaitable[object]]) -> None:
    execute = server_of(lock)._execute

    async def late(name: str, *arguments: str | bytes | int) -> Any:
        await act(name)
        return await execute(name, *arguments)

    server_of(lock)._execute = late  # type: ignore[method-assign]


# -- the table ----------------------------------------------------------------------------------------


async def test_a_free_key_is_locked(redis: Redis, lock: Lock, key: str) -> None:
    """The first to ask holds the lock, under the prefix, with our token and the lock's life; one key, no other."""
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
    assert await redis.get(key) == OURS
    assert await has_ttl(redis, key, LOCK_TTL_MS)
    assert await redis.keys(key.replace(ID, "*")) == [key.encode()]


async def test_our_own_lock_is_held(redis: Redis, lock: Lock, key: str) -> None:
    """Asked again with the same token (its first reply was lost), the lock is still ours."""
    await redis.set(key, OURS, px=5000)
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
    assert await redis.get(key) == OURS


async def test_a_marker_of_this_epoch_answers(redis: Redis, lock: Lock, key: str) -> None:
    """A durable row exists: nothing is locked, and the marker keeps its life."""
    await redis.set(key, RECORDED, px=MARKER_TTL_MS)
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.RECORDED
    assert await redis.get(key) == RECORDED
    assert await has_ttl(redis, key, MARKER_TTL_MS)


@pytest.mark.parametrize("left_over", [OTHER_EPOCH, b"recorded:", b"recorded", b"", b"garbage", b"\xff\0", b"claimed"])
@pytest.mark.parametrize("life", [None, 5000, MARKER_TTL_MS])
async def test_what_is_left_over_is_taken(
    redis: Redis, lock: Lock, key: str, left_over: bytes, life: int | None
) -> None:
    """A marker of another epoch, or what nobody of ours wrote, counts for nothing, and is replaced by our lock."""
    await redis.set(key, left_over, px=life)
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
    assert await redis.get(key) == OURS
    assert await has_ttl(redis, key, LOCK_TTL_MS)


@pytest.mark.parametrize("over_marker", [False, True])
@pytest.mark.parametrize("life", [1000, LOCK_TTL_MS])
async def test_anothers_live_lock_is_left_alone(
    redis: Redis, lock: Lock, key: str, life: int, over_marker: bool
) -> None:
    """Somebody is between lock and row: neither a delivery nor recovery takes that, or makes it last longer."""
    await redis.set(key, THEIRS, px=life)
    assert await lock.acquire(ID, TOKEN, EPOCH, over_marker=over_marker) is LockReply.BUSY
    assert await redis.get(key) == THEIRS
    assert await redis.pttl(key) <= life


@pytest.mark.parametrize("life", [None, LOCK_TTL_MS + 5000, MARKER_TTL_MS])
async def test_a_lock_that_would_outlive_every_lock_is_taken(
    redis: Redis, lock: Lock, key: str, life: int | None
) -> None:
    """A `claimed` without a life, or with a longer one than ours have, would delay its event for ever."""
    await redis.set(key, THEIRS, px=life)
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
    assert await redis.get(key) == OURS
    assert await has_ttl(redis, key, LOCK_TTL_MS)


@pytest.mark.parametrize("marker", [RECORDED, OTHER_EPOCH, b"recorded:", b"recorded:None"])
async def test_no_marker_counts_while_the_epoch_is_unknown(redis: Redis, lock: Lock, key: str, marker: bytes) -> None:
    """While Postgres cannot confirm its epoch (it may be being restored), no marker answers for it."""
    await redis.set(key, marker, px=MARKER_TTL_MS)
    assert await lock.acquire(ID, TOKEN, None) is LockReply.HELD
    assert await redis.get(key) == OURS


async def test_recovery_locks_over_a_marker(redis: Redis, lock: Lock, key: str) -> None:
    """The ledger said that work is due, so a marker, even of this epoch, is no evidence against it."""
    await redis.set(key, RECORDED, px=MARKER_TTL_MS)
    assert await lock.acquire(ID, TOKEN, EPOCH, over_marker=True) is LockReply.HELD
    assert await redis.get(key) == OURS
    assert await has_ttl(redis, key, LOCK_TTL_MS)


@pytest.mark.parametrize("kind", ["list", "hash", "set", "zset"])
async def test_a_key_of_the_wrong_type_is_deleted(redis: Redis, lock: Lock, key: str, kind: str) -> None:
    """It concerns that one key: it is deleted and locked, and Redis does not count as away."""
    puts: dict[str, Callable[[], Awaitable[Any]]] = {
        "list": lambda: redis.rpush(key, "x"),
        "hash": lambda: redis.hset(key, "x", "y"),
        "set": lambda: redis.sadd(key, "x"),
        "zset": lambda: redis.zadd(key, {"x": 1}),
    }
    await puts[kind]()
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
    assert await redis.get(key) == OURS
    assert not lock.unreachable


async def test_the_wrong_type_stops_no_marker_and_no_release(redis: Redis, lock: Lock, key: str) -> None:
    """Writing a marker over such a key, or releasing it, changes nothing and raises nothing."""
    await redis.rpush(key, "x")
    await lock.mark_recorded(ID, TOKEN, EPOCH)
    await lock.forget(ID, TOKEN, EPOCH)
    assert await redis.type(key) == b"list"
    assert not lock.unreachable


async def test_of_fifty_at_once_one_holds_it(redis: Redis, lock: Lock) -> None:
    """However many ask for one event at the same moment, exactly one gets the lock, also over a left-over value."""
    for epoch in (EPOCH, None):
        replies = await asyncio.gather(*(lock.acquire(ID, new_token(), epoch) for _ in range(50)))
        assert replies.count(LockReply.HELD) == 1
        assert replies.count(LockReply.BUSY) == 49
        await redis.set(redis_key(lock), OTHER_EPOCH, px=MARKER_TTL_MS)


async def test_a_value_that_changes_hands_is_not_taken(redis: Redis, lock: Lock, key: str) -> None:
    """Between our look at a left-over value and our taking it another took it: compare-and-set leaves that alone."""
    await redis.set(key, OTHER_EPOCH, px=MARKER_TTL_MS)
    before(lock, "EVAL", lambda: redis.set(key, THEIRS, px=LOCK_TTL_MS))
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.BUSY
    assert await redis.get(key) == THEIRS


async def test_a_lock_that_runs_out_under_our_eyes_is_busy_once(redis: Redis, lock: Lock, key: str) -> None:
    """Gone between the two looks, it was live a moment ago: this delivery records, the next one finds it free."""
    await redis.set(key, THEIRS, px=LOCK_TTL_MS)
    before(lock, "PTTL", lambda: redis.delete(key))
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.BUSY
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD


# -- marker and release -------------------------------------------------------------------------------


async def test_our_lock_becomes_the_marker(redis: Redis, lock: Lock, key: str) -> None:
    """Once the row's COMMIT is known, with the epoch that it was committed under and the marker's life."""
    await lock.acquire(ID, TOKEN, EPOCH)
    await lock.mark_recorded(ID, TOKEN, EPOCH)
    assert await redis.get(key) == RECORDED
    assert await has_ttl(redis, key, MARKER_TTL_MS)
    assert await lock.acquire(ID, new_token(), EPOCH) is LockReply.RECORDED


@pytest.mark.parametrize("seen", [None, THEIRS, OTHER_EPOCH, RECORDED, b"garbage", b"claimed:"])
async def test_only_our_own_lock_becomes_a_marker(redis: Redis, lock: Lock, key: str, seen: bytes | None) -> None:
    """A lock that ran out, or that is another's by now, is neither replaced nor created nor prolonged."""
    if seen is not None:
        await redis.set(key, seen, px=5000)
    await lock.mark_recorded(ID, TOKEN, EPOCH)
    assert await redis.get(key) == seen
    assert await redis.pttl(key) <= 5000


async def test_without_an_epoch_there_is_no_marker(redis: Redis, lock: Lock, key: str) -> None:
    """A row committed under an unknown epoch leaves the lock to run out."""
    await lock.acquire(ID, TOKEN, None)
    await lock.mark_recorded(ID, TOKEN, None)
    assert await redis.get(key) == OURS


@pytest.mark.parametrize("seen", [OURS, RECORDED])
async def test_our_own_value_is_released(redis: Redis, lock: Lock, key: str, seen: bytes) -> None:
    """Our lock, or the marker of our row: gone, so that the next delivery reaches the ledger."""
    await redis.set(key, seen, px=5000)
    await lock.forget(ID, TOKEN, EPOCH)
    assert await redis.get(key) is None


@pytest.mark.parametrize("epoch", [EPOCH, None])
@pytest.mark.parametrize("seen", [THEIRS, OTHER_EPOCH, b"garbage"])
async def test_anothers_value_is_never_released(
    redis: Redis, lock: Lock, key: str, seen: bytes, epoch: str | None
) -> None:
    """What another wrote meanwhile stays as it is."""
    await redis.set(key, seen, px=5000)
    await lock.forget(ID, TOKEN, epoch)
    assert await redis.get(key) == seen


async def test_a_marker_stays_when_only_the_lock_is_released(redis: Redis, lock: Lock, key: str) -> None:
    """Released without an epoch, a marker keeps promising the row that it was written for."""
    await redis.set(key, RECORDED, px=5000)
    await lock.forget(ID, TOKEN, None)
    assert await redis.get(key) == RECORDED


# -- what it costs ------------------------------------------------------------------------------------


async def test_a_duplicate_is_one_command(redis: Redis, lock: Lock, key: str, commands: list[str]) -> None:
    """A duplicate after completion asks Redis once."""
    await redis.set(key, RECORDED, px=MARKER_TTL_MS)
    commands.clear()
    await lock.acquire(ID, TOKEN, EPOCH)
    assert commands == ["SET"]


async def test_a_first_delivery_is_two_commands(lock: Lock, commands: list[str]) -> None:
    """Lock and marker."""
    await lock.acquire(ID, TOKEN, EPOCH)
    await lock.mark_recorded(ID, TOKEN, EPOCH)
    assert commands == ["SET", "EVAL"]


def server_of(lock: Lock) -> RedisServer:
    assert isinstance(lock._servers, RedisServer)
    return lock._servers


def redis_key(lock: Lock) -> str:
    return lock._key(ID)


# -- Redis is away ------------------------------------------------------------------------------------


THEIRS_REPLY = b"$%d\r\n%b\r\n" % (len(THEIRS), THEIRS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """The breaker's clock."""
    return HandClock.installed(monkeypatch, redis_server)


class Server:
    """Speaks Redis' protocol: answers each command as told, `None` being never; remembers what it heard."""

    def __init__(self) -> None:
        self.reply: bytes | None = b"+OK\r\n"
        self.replies: dict[str, bytes] = {}  # by the command's name, before `reply`
        self.heard: list[str] = []
        self.hang_up = False
        self.pause_seconds = 0.0  # before each reply
        self.connections: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        commands = hiredis.Reader()
        while chunk := await reader.read(65_536):
            commands.feed(chunk)
            while (command := commands.gets()) is not False:
                name = command[0].decode().upper()
                await asyncio.sleep(self.pause_seconds)
                if name == "CLIENT":  # its name, sent once per connection
                    writer.write(b"+OK\r\n")
                    continue
                self.heard.append(name)
                if self.hang_up:
                    writer.close()
                elif (reply := self.replies.get(name, self.reply)) is not None:
                    writer.write(reply)
        writer.close()


@asynccontextmanager
async def listening(server: Server, timeout_seconds: float = 2, database: int = 0) -> AsyncIterator[Redis]:
    """A client as the service makes it, of that server."""
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, connect(f"redis://127.0.0.1:{port}/{database}", timeout_seconds=timeout_seconds) as client:
        yield client
        while _made:
            await _made.pop().close()


async def is_away(lock: Lock) -> None:
    """Nothing raises: asking is `AWAY`, writing and deleting do nothing."""
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
    await lock.mark_recorded(ID, TOKEN, EPOCH)
    await lock.forget(ID, TOKEN, EPOCH)
    assert lock.unreachable
    with pytest.raises(LockUnavailable):
        await lock.ping()


async def test_a_stopped_server_is_away(unused_tcp_port: int) -> None:
    """Nobody listens: refused, and therefore away."""
    async with connect(f"redis://127.0.0.1:{unused_tcp_port}", timeout_seconds=2) as client:
        await is_away(make(client))


async def test_a_missing_socket_is_away() -> None:
    """The same for a Unix socket that is not there, and for a host whose name nobody knows."""
    for url in ("unix:///nowhere/redis.sock", "redis://nowhere.invalid"):
        async with connect(url, timeout_seconds=2) as client:
            await is_away(make(client))


async def test_a_frozen_server_is_away() -> None:
    """It takes the connection and the command, and never answers: a timeout, and therefore away."""
    server = Server()
    server.reply = None
    async with listening(server, timeout_seconds=0.3) as client, asyncio.timeout(10):
        await is_away(make(client))


ERRORS = [
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-NOAUTH Authentication required.\r\n",
    b"-WRONGPASS invalid username-password pair or user is disabled.\r\n",
    b"-NOPERM User default has no permissions to run the 'set' command\r\n",
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-BUSY Redis is busy running a script.\r\n",
    b"-MASTERDOWN Link with MASTER is down\r\n",
    b"-CLUSTERDOWN Hash slot not served\r\n",
    b"-MOVED 3999 127.0.0.1:6381\r\n",
    b"-MISCONF Errors writing to the AOF file\r\n",
    b"-NOREPLICAS Not enough good replicas to write.\r\n",
    b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    b"-ERR syntax error\r\n",
    b"-ASK nonsense\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.split()[0].decode())
async def test_a_server_that_refuses_is_away(error: bytes) -> None:
    """OOM, READONLY, NOPERM and their like are no connection errors, and all the same no lock can be had."""
    server = Server()
    server.reply = error
    async with listening(server) as client:
        await is_away(make(client))


async def test_a_user_without_rights_is_away(stores: Stores) -> None:
    """A real server's own NOPERM, and its WRONGPASS."""
    async with redis_user(stores, "-set", "-ping") as (_, right):
        for url in (right, right.replace(":right@", ":wrong@")):
            async with connect(url, timeout_seconds=2) as client:
                await is_away(make(client))


@pytest.mark.parametrize("command", ["SET", "GET", "PTTL", "EVAL", "DEL"])
async def test_each_missing_right_is_named(stores: Stores, redis_prefix: str, command: str) -> None:
    """Every command that the lock needs is tried, and a refusal names the command."""
    async with redis_user(stores, f"-{command.lower()}") as (_, url), connect(url, timeout_seconds=2) as client:
        with pytest.raises(LockUnavailable, match=f"^{command} is refused: "):
            await server_of(make(client, redis_prefix)).try_commands(redis_prefix + "check")


async def test_trying_the_commands_changes_no_lock(redis: Redis, lock: Lock, key: str, commands: list[str]) -> None:
    """The commands are tried on a key of their own, which does not stay: also both scripts change it."""
    await redis.set(key, THEIRS)
    await server_of(lock).try_commands(key + "/check")
    assert commands == ["SET", "GET", "PTTL", "DEL", "SET", "EVAL", "EVAL"]
    assert await redis.keys(key.replace(ID, "*")) == [key.encode()]


@pytest.mark.parametrize("reply", [b":1\r\n", b"*0\r\n", b"*1\r\n$1\r\nx\r\n"], ids=["integer", "empty", "array"])
async def test_a_set_answered_with_another_type_is_away(reply: bytes) -> None:
    """A reply that SET never has is no exception: the event is recorded without the lock, and Redis was reached."""
    server = Server()
    server.reply = reply
    async with listening(server) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        assert not lock.unreachable
        server.reply = b"$-1\r\n"
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD


@pytest.mark.parametrize("command", ["EVAL", "PTTL"])
@pytest.mark.parametrize("reply", [b"$1\r\n1\r\n", b"*0\r\n", b"$-1\r\n"], ids=["text", "array", "nothing"])
async def test_no_other_reply_of_another_type_counts(command: str, reply: bytes) -> None:
    """A script or PTTL that is answered with another type than an integer gives no lock, and raises nothing."""
    server = Server()
    current = OTHER_EPOCH if command == "EVAL" else THEIRS
    server.replies = {"SET": b"$%d\r\n%b\r\n" % (len(current), current), command: reply}
    async with listening(server) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        await lock.mark_recorded(ID, TOKEN, EPOCH)
        await lock.forget(ID, TOKEN, EPOCH)
        assert not lock.unreachable


async def test_a_lost_reply_is_not_asked_for_again(clock: HandClock) -> None:
    """The command may have been applied: repeated by the library, our own lock would look like another's."""
    server = Server()
    server.hang_up = True
    async with listening(server) as client:
        assert await make(client).acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
    assert server.heard == ["SET"]


async def test_a_command_under_way_is_never_cancelled(clock: HandClock) -> None:
    """Whoever asked has given up: the reply is read all the same, or it would be taken for the next command's."""
    server = Server()
    server.reply = None

    async def has_heard() -> bool:
        return bool(server.heard)

    async with listening(server, timeout_seconds=10) as client:
        lock = make(client)
        asking = asyncio.create_task(lock.acquire(ID, TOKEN, EPOCH))
        await until(has_heard)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        server.reply = b"$-1\r\n"
        server.connections[0].write(THEIRS_REPLY)
        assert await lock.acquire("evt_2", TOKEN, EPOCH) is LockReply.HELD
    assert (server.heard, len(server.connections)) == (["SET", "SET"], 1)


async def test_a_late_reply_is_nobodys() -> None:
    """What a frozen server says when it thaws, to a command that was given up on, is no answer to the next one."""
    server = Server()
    server.reply = None
    async with listening(server, timeout_seconds=0.3) as client:
        lock = make(client, breaker_seconds=0)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        server.reply = b"$-1\r\n"
        server.connections[0].write(b"$%d\r\n%b\r\n" % (len(RECORDED), RECORDED))
        assert await lock.acquire("evt_2", TOKEN, EPOCH) is LockReply.HELD
    assert len(server.connections) == 2


async def test_a_connection_closed_while_idle_is_opened_again() -> None:
    """A server that closes idle connections, or was restarted, is not away: nobody waits for a breaker."""
    server = Server()
    server.reply = b"$-1\r\n"
    async with listening(server) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
        server.connections[0].close()

        async def closed() -> bool:
            return not server_of(lock)._commands.connected

        await until(closed)
        assert await lock.acquire("evt_2", TOKEN, EPOCH) is LockReply.HELD
    assert (server.heard, len(server.connections)) == (["SET", "SET"], 2)


async def test_a_server_that_became_a_replica_is_asked_on_a_new_connection(clock: HandClock) -> None:
    """READONLY: the address may lead to the new primary, so the next attempt connects anew, once per window."""
    server = Server()
    server.reply = b"-READONLY You can't write against a read only replica.\r\n"
    async with listening(server) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        server.reply = b"$-1\r\n"
        clock.now += BREAKER_SECONDS
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
        assert await lock.acquire("evt_2", TOKEN, EPOCH) is LockReply.HELD
    assert (server.heard, len(server.connections)) == (["SET"] * 3, 2)


async def test_a_slow_line_is_not_away() -> None:
    """To connect takes several round trips: each of them may take the timeout, as each batch may afterwards."""
    server = Server()
    server.reply, server.pause_seconds = b"$-1\r\n", 0.6
    server.replies = {"SELECT": b"+OK\r\n"}
    async with listening(server, timeout_seconds=1, database=1) as client:
        assert await make(client).acquire(ID, TOKEN, EPOCH) is LockReply.HELD


# -- the breaker --------------------------------------------------------------------------------------


async def test_an_outage_costs_one_timeout_per_window(clock: HandClock) -> None:
    """After one failure nobody asks until the window is over: 100 deliveries wait for nothing."""
    server = Server()
    server.reply = None
    async with listening(server, timeout_seconds=0.3) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        assert server.heard == ["SET"]
        clock.now += BREAKER_SECONDS - 0.001
        assert lock.unreachable
        for number in range(100):
            assert await lock.acquire(f"evt_{number}", TOKEN, EPOCH) is LockReply.UNREACHABLE
            assert server.heard == ["SET"]
        await lock.mark_recorded(ID, TOKEN, EPOCH)
        await lock.forget(ID, TOKEN, EPOCH)
    assert server.heard == ["SET"]


async def test_a_thousand_at_once_wait_for_one_timeout(clock: HandClock) -> None:
    """They are several batches: those behind the one that was not answered are not sent to find out the same."""
    server = Server()
    server.reply = None
    async with listening(server, timeout_seconds=0.3) as client:
        lock = make(client)
        replies = await asyncio.gather(*(lock.acquire(f"evt_{number}", TOKEN, EPOCH) for number in range(1000)))
    assert set(replies) == {LockReply.UNREACHABLE}
    assert (len(server.heard), len(server.connections)) == (200, 1)


async def test_after_the_window_one_asks_for_all(clock: HandClock) -> None:
    """Of 20 deliveries at the end of a window one finds out, the others do not wait; it failed: another window."""
    server = Server()
    server.reply = None
    async with listening(server, timeout_seconds=0.3) as client:
        lock = make(client)
        for window in range(1, 4):
            replies = await asyncio.gather(*(lock.acquire(f"evt_{number}", TOKEN, EPOCH) for number in range(20)))
            assert set(replies) == {LockReply.UNREACHABLE}
            assert len(server.heard) == 20 + window - 1  # all of the first outage were under way together
            assert lock.unreachable
            clock.now += BREAKER_SECONDS


async def test_the_breaker_closes_when_redis_is_back(clock: HandClock) -> None:
    """One good reply after the window, and everybody asks again."""
    server = Server()
    server.reply = ERRORS[0]
    async with listening(server) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        server.reply = b"$-1\r\n"
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        clock.now += BREAKER_SECONDS
        assert not lock.unreachable
        for number in range(20):
            assert await lock.acquire(f"evt_{number}", TOKEN, EPOCH) is LockReply.HELD
        assert not lock.unreachable
    assert len(server.heard) == 21


async def test_a_marker_is_small(redis: Redis) -> None:
    """What a marker costs without its slots in the hash tables, on every server: the figure in docs/ rests on it."""
    keys = await write_markers(redis, 3)
    try:
        for key in keys:
            assert 80 <= (await redis.memory_usage(key) or 0) <= 130
    finally:
        await redis.delete(*keys)


async def test_a_ping_asks_whatever_the_breaker_says(clock: HandClock) -> None:
    """A probe of readiness wants to know how Redis is now."""
    server = Server()
    server.reply = ERRORS[0]
    async with listening(server) as client:
        lock = make(client)
        assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        server.reply = b"+PONG\r\n"
        await lock.ping()
    assert server.heard == ["SET", "PING"]


async def test_one_odd_key_does_not_trip_the_breaker(redis: Redis, lock: Lock, clock: HandClock) -> None:
    """A key that is given the wrong type again and again is given up on, and no other event waits for it."""
    poison = redis_key(lock)

    async def poison_again() -> None:
        await redis.delete(poison)
        await redis.rpush(poison, "x")

    before(lock, "SET", poison_again)
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
    assert not lock.unreachable
    assert await lock.acquire("evt_2", TOKEN, EPOCH) is LockReply.HELD


async def test_one_odd_key_closes_the_breaker(redis: Redis, lock: Lock, key: str, clock: HandClock) -> None:
    """After an outage the first command meets a key of another type: Redis has answered, so the breaker closes."""
    server_of(lock)._trip(ConnectionError(), "SET")
    await redis.rpush(key, "x")
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
    clock.now += BREAKER_SECONDS
    assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
    assert await redis.get(key) == OURS
    assert await lock.acquire("evt_2", TOKEN, EPOCH) is LockReply.HELD


@pytest.mark.parametrize("command", ["EVAL", "PTTL"])
async def test_after_a_refused_command_the_probe_tries_it(
    stores: Stores, redis: Redis, redis_prefix: str, clock: HandClock, command: str
) -> None:
    """While a command other than SET is refused, no accepted SET closes the breaker; the right once given does."""
    async with redis_user(stores, f"-{command.lower()}") as (name, url), connect(url, timeout_seconds=2) as client:
        lock = make(client, redis_prefix)
        if command == "PTTL":
            await redis.set(redis_prefix + ID, THEIRS, px=LOCK_TTL_MS)
            assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.UNREACHABLE
        else:
            assert await lock.acquire(ID, TOKEN, EPOCH) is LockReply.HELD
            await lock.mark_recorded(ID, TOKEN, EPOCH)
        assert lock.unreachable
        for number in range(3):
            clock.now += BREAKER_SECONDS
            assert await lock.acquire(f"evt_2{number}", TOKEN, EPOCH) is LockReply.UNREACHABLE
            assert lock.unreachable
        await redis.acl_setuser(name, enabled=True, commands=[f"+{command.lower()}"])
        clock.now += BREAKER_SECONDS
        assert await lock.acquire("evt_3", TOKEN, EPOCH) is LockReply.HELD
        assert await lock.acquire("evt_4", TOKEN, EPOCH) is LockReply.HELD


async def test_a_set_accepted_beside_a_refused_script_closes_nothing(clock: HandClock) -> None:
    """A SET and a script in one round trip, the script refused: the accepted SET does not close the breaker again."""
    server = Server()
    server.replies = {"SET": b"$-1\r\n", "EVAL": b"-NOPERM no\r\n"}
    async with listening(server) as client:
        lock = make(client)
        _, reply = await asyncio.gather(lock.mark_recorded(ID, TOKEN, EPOCH), lock.acquire("evt_2", TOKEN, EPOCH))
        assert reply is LockReply.HELD
        assert lock.unreachable
