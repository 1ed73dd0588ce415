"""Payloads are archived before they are pruned, in a folder and in a bucket of a real S3-compatible server (moto).

A payload is deleted only after its file is stored. What is stored comes back byte for byte.
"""

import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from moto.server import ThreadedMotoServer

from firstclaim.errors import ArchiveUnavailable, ConfigurationError
from firstclaim.operations import archive as archive_module
from firstclaim.operations import prune as prune_module
from firstclaim.operations.archive import find
from firstclaim.operations.archive_storage import FolderStorage, S3Storage, Storage, open_storage
from firstclaim.operations.commands import Commands
from firstclaim.operations.pace import Pace
from firstclaim.operations.prune import Pruned, Retention, prune
from firstclaim.operations.selection import Selection
from firstclaim.status import Status
from tests.integration.world import World, delivery
from tests.operator import OPERATOR

BUCKET = "payloads"
AUTHORISED = 1_000_000  # requests before the server asks for credentials
RETENTION = Retention(90, 400)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3-compatible server that has one bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    assert httpx.put(f"{endpoint}/{BUCKET}", trust_env=False).status_code == 200
    yield endpoint
    server.stop()


def authorise(s3: str, *, after: int) -> None:
    """Let the server ask for credentials after so many requests more."""
    httpx.post(f"{s3}/moto-api/reset-auth", content=str(after).encode(), trust_env=False)


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of that bucket, with everything in the environment that it needs."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "access",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/ledger"


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Each kind of storage, empty."""
    if request.param == "folder":
        return open_storage((tmp_path / "archive").as_uri())
    return open_storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.fixture
async def operations(world: World, module_database: str) -> AsyncIterator[Commands]:
    """On a connection of its own."""
    async with Commands.connect(module_database, 5) as operations:
        yield operations


async def event(world: World, days: float, status: Status = Status.COMPLETED) -> str:
    """A new event that was settled so many days ago."""
    given = await world.state_of(delivery(), status)
    await world.age(given.event.id, days)
    return given.event.id


async def payloads(world: World) -> set[str]:
    """The events that have a payload."""
    return {row[0] for row in await world.database.fetch("SELECT event_id FROM firstclaim.stripe_event_payloads")}


async def pruned(operations: Commands, storage: Storage | None, retention: Retention = RETENTION) -> Pruned:
    return sum([batch async for batch in prune(operations, OPERATOR, retention, storage)], Pruned())


class Interposed:
    """A folder, and something that happens when a file is to be stored, or has been."""

    def __init__(self, path: Path) -> None:
        self._folder = FolderStorage(path)
        self.before: Callable[[], Awaitable[Any]] | None = None
        self.after: Callable[[], Awaitable[Any]] | None = None

    async def put(self, name: str, content: bytes) -> None:
        if self.before is not None:
            await self.before()
        await self._folder.put(name, content)
        if self.after is not None:
            await self.after()

    async def names(self, prefix: str) -> list[str]:
        return await self._folder.names(prefix)

    async def get(self, name: str) -> bytes:
        return await self._folder.get(name)


async def refuse() -> None:
    """What a storage does that is full."""
    raise ArchiveUnavailable("full")


# -- what is stored -----------------------------------------------------------------------------------


async def test_payloads_come_back_byte_for_byte(world: World, operations: Commands, storage: Storage) -> None:
    """They are stored and gone, in any encoding; the event's own file is found by the time of its receipt."""
    text, binary, young = [await event(world, days) for days in (100, 100, 10)]
    await world.database.execute(
        "UPDATE firstclaim.stripe_event_payloads SET body = $2, headers = 'user-agent: Stripe' WHERE event_id = $1",
        binary,
        b"\xff\x00 no text",
    )
    bodies = {each: await operations.payload(each) for each in (text, binary)}
    assert await pruned(operations, storage) == Pruned(payloads=2, archived=2)
    assert await payloads(world) == {young}
    for each, body in bodies.items():
        row = await operations.find(each)
        assert row is not None
        for when in (row.received_at, row.received_at.astimezone(UTC).date()):
            found = await find(storage, each, when)
            assert found is not None
            assert (found.body, found.type, found.received_at) == (body, row.type, row.received_at)
            assert found.headers == ("user-agent: Stripe" if each == binary else None)
        assert await find(storage, "evt_other", row.received_at) is None
    assert await find(storage, text, datetime(2020, 1, 1, tzinfo=UTC)) is None
    assert await pruned(operations, storage) == Pruned()


async def test_a_file_is_lines_of_json(world: World, operations: Commands, tmp_path: Path) -> None:
    """Any tool reads it: the folder is the day, the name has the times, the content is gzip over JSON."""
    old = await event(world, 100)
    body = await operations.payload(old)
    await pruned(operations, FolderStorage(tmp_path / "archive"))
    [path] = (tmp_path / "archive").glob("**/*.gz")
    [line] = gzip.decompress(path.read_bytes()).splitlines()
    content = orjson.loads(line)
    assert (content["id"], content["body"].encode()) == (old, body)
    day = datetime.now(UTC) - timedelta(days=100)
    assert str(path.parent.relative_to(tmp_path / "archive")) in (f"{day:%Y/%m/%d}", f"{day - timedelta(1):%Y/%m/%d}")
    assert path.stat().st_mode & 0o077 == 0


async def test_files_are_bounded(
    world: World, operations: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has so many events and no more, and events of one day only."""
    monkeypatch.setattr(archive_module, "FILE_EVENTS_MOST", 2)
    storage = FolderStorage(tmp_path / "archive")
    for days in (100, 100, 100, 200):
        await event(world, days)
    batches = [batch async for batch in prune(operations, OPERATOR, RETENTION, storage)]
    assert sorted(batch.archived for batch in batches) == [1, 1, 2]
    monkeypatch.setattr(archive_module, "FILE_EVENTS_MOST", 10_000)
    monkeypatch.setattr(archive_module, "FILE_MOST_BYTES", 1)
    for _ in range(2):
        await event(world, 100)
    assert [batch.archived async for batch in prune(operations, OPERATOR, RETENTION, storage)] == [1, 1]


async def test_days_in_any_order_keep_few_files_open(
    world: World, operations: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payloads from before schema 0015 come in the order of their ids: if too many files are open, one is stored."""
    monkeypatch.setattr(prune_module, "_OPEN_FILES_MOST", 1)
    monkeypatch.setattr(prune_module, "BATCH", 2)
    for days in (100, 200, 300, 100):
        await event(world, days)
    await world.database.execute("UPDATE firstclaim.stripe_event_payloads SET received_at = NULL")
    assert await pruned(operations, FolderStorage(tmp_path / "archive")) == Pruned(payloads=4, archived=4)
    assert await payloads(world) == set()


async def test_a_row_is_deleted_once_its_payload_is_stored(world: World, operations: Commands, tmp_path: Path) -> None:
    """Also where rows go before payloads would: each payload is stored first."""
    storage = FolderStorage(tmp_path / "archive")
    dead = await event(world, 50, Status.DEAD)
    retention = Retention(90, 40, include_dead=True)
    assert await pruned(operations, storage, retention) == Pruned(payloads=1, rows=1, archived=1)
    assert await operations.find(dead) is None
    found = await find(storage, dead, (datetime.now(UTC) - timedelta(days=50)).date())
    assert found is not None
    [row] = await world.database.fetch("SELECT selection, changed FROM firstclaim.operator_actions")
    assert tuple(row) == ("payloads=90d rows=40d dead archived", 2)


# -- what is not stored is not deleted ----------------------------------------------------------------


async def test_nothing_is_deleted_that_is_not_stored(world: World, operations: Commands, tmp_path: Path) -> None:
    """The storage refuses: the ledger is as it was, and the audit has what was changed."""
    old = {await event(world, days) for days in (100, 500)}
    storage = Interposed(tmp_path / "archive")
    storage.before = refuse
    with pytest.raises(ArchiveUnavailable, match="full"):
        await pruned(operations, storage)
    assert await payloads(world) == old
    assert len(await operations.list_events(Selection(), 9)) == 2
    assert await world.database.fetchval("SELECT changed FROM firstclaim.operator_actions") == 0


@pytest.mark.parametrize("archived", [False, True])
async def test_every_statement_of_a_prune_is_paced(
    world: World, operations: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archived: bool
) -> None:
    """Each statement waits for the rest after the one before it, but for the two of the audit."""
    given: list[float] = []
    paced, unpaced, within = [0], [0], [False]

    class Watched(Pace):
        def __init__(self, busy_percent: float) -> None:
            given.append(busy_percent)

        @asynccontextmanager
        async def statement(self) -> AsyncIterator[None]:
            within[0] = True
            yield
            within[0] = False

    async def fetch(*arguments: Any, **values: Any) -> list[Any]:
        (paced if within[0] else unpaced)[0] += 1
        return await whole(*arguments, **values)

    await event(world, 100), await event(world, 500)
    whole = operations.fetch
    monkeypatch.setattr(prune_module, "Pace", Watched)
    monkeypatch.setattr(operations, "fetch", fetch)
    storage = FolderStorage(tmp_path / "archive") if archived else None
    batches = prune(operations, OPERATOR, RETENTION, storage, busy_percent=25)
    assert sum([batch async for batch in batches], Pruned()).rows == 1
    assert given == [25]
    assert paced[0] > 4
    assert unpaced == [2]


async def test_a_prune_that_is_killed_loses_nothing(world: World, operations: Commands, tmp_path: Path) -> None:
    """Killed between the file and the deletion: the next prune stores the same file again, under the same name."""
    old = await event(world, 100)
    storage = Interposed(tmp_path / "archive")
    storage.after = refuse
    with pytest.raises(ArchiveUnavailable):
        await pruned(operations, storage)
    assert await payloads(world) == {old}
    storage.after = None
    assert await pruned(operations, storage) == Pruned(payloads=1, archived=1)
    assert len(list((tmp_path / "archive").glob("**/*.gz"))) == 1


async def test_what_is_replayed_meanwhile_keeps_its_payload(world: World, operations: Commands, tmp_path: Path) -> None:
    """An event that is replayed while its file is being stored needs its payload."""
    old, replayed = [await event(world, 100, Status.IGNORED) for _ in range(2)]
    storage = Interposed(tmp_path / "archive")
    storage.before = lambda: world.settle(replayed, Status.PENDING)
    assert await pruned(operations, storage) == Pruned(payloads=1, archived=2)
    assert await payloads(world) == {replayed}
    assert await operations.payload(old) is None


async def test_a_row_with_a_payload_is_kept(world: World, operations: Commands, tmp_path: Path) -> None:
    """A payload that was put back while the others were stored is in no file: its row stays, and it does."""
    restored, other = [await event(world, 500) for _ in range(2)]
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads WHERE event_id = $1", restored)
    storage = Interposed(tmp_path / "archive")
    storage.before = lambda: operations.restore_payload(OPERATOR, restored, b"{}", traceparent=None, headers=None)
    assert await pruned(operations, storage) == Pruned(payloads=1, rows=1, archived=1)
    assert await payloads(world) == {restored}
    assert await operations.find(restored) is not None
    assert await operations.find(other) is None


# -- reading back -------------------------------------------------------------------------------------


async def test_a_payload_is_put_back(world: World, operations: Commands, tmp_path: Path) -> None:
    """The event can be replayed again; what has a payload, and what the ledger does not have, is left alone."""
    old = await event(world, 100, Status.IGNORED)
    body = await operations.payload(old)
    await pruned(operations, FolderStorage(tmp_path / "archive"))
    for done in (True, False):
        assert await operations.restore_payload(OPERATOR, old, body or b"", traceparent=None, headers=None) is done
    assert await operations.payload(old) == body
    assert not await operations.restore_payload(OPERATOR, "evt_no", b"", traceparent=None, headers=None)
    [chosen] = await operations.select_candidates(Selection([old]))
    assert chosen.has_payload
    assert await pruned(operations, None) == Pruned(), "it counts as recorded when it was put back"


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b'{"id": "evt_1"}\n')], ids=["text", "no time"])
async def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    """It is reported by its name, and never taken for the event's absence."""
    storage = FolderStorage(tmp_path)
    await storage.put("2026/08/27/renamed.jsonl.gz", content)
    with pytest.raises(ArchiveUnavailable, match=r"2026/08/27/renamed\.jsonl\.gz"):
        await find(storage, "evt_1", datetime(2026, 8, 27, tzinfo=UTC))


# -- a storage that refuses ---------------------------------------------------------------------------


async def test_a_bucket_that_is_not_there(bucket: str) -> None:
    """It is named, with what to do."""
    storage = open_storage("s3://missing/ledger")
    for attempt in (storage.put("a", b""), storage.get("a")):
        with pytest.raises(ArchiveUnavailable, match=r"s3://missing/ledger: NoSuchBucket .*create the bucket"):
            await attempt


async def test_wrong_credentials(bucket: str, s3: str) -> None:
    """The server's refusal is named, with the variable to look at; nothing of the secret is."""
    authorise(s3, after=0)
    try:
        with pytest.raises(ArchiveUnavailable, match=r"InvalidAccessKeyId .*check AWS_ACCESS_KEY_ID") as refused:
            await open_storage(bucket).put("a", b"")
        assert "secret" not in str(refused.value).lower().replace("secret_access_key", "")
    finally:
        authorise(s3, after=AUTHORISED)


async def test_a_server_that_is_not_there(bucket: str, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to check is named."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_tcp_port}")
    monkeypatch.setattr("firstclaim.operations.archive_storage._RETRIES", 0)
    with pytest.raises(ArchiveUnavailable, match="check AWS_ENDPOINT_URL"):
        await open_storage(bucket).put("a", b"")


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A folder whose parent is missing (a disk that is not mounted) is not made; a file in its place is named."""
    with pytest.raises(ArchiveUnavailable, match="No such file or directory"):
        await FolderStorage(tmp_path / "unmounted" / "archive").put("a", b"")
    with pytest.raises(ArchiveUnavailable, match="No such file or directory"):
        await FolderStorage(tmp_path / "unmounted").names("2026/01/01")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArchiveUnavailable, match="Not a directory"):
        await FolderStorage(tmp_path / "file").put("2026/a", b"")


def test_obstore_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'firstclaim\[archive\]'"):
        S3Storage("s3://bucket")
