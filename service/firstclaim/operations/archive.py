"""The archive: the payloads of pruned events, in files of a day each.

Guarantees: a body comes back byte for byte. A file's name says the day and the times at which its events were received,
so one event is found by reading the few files around its time, without a catalogue. The same events make the same
bytes under the same name: a prune that was killed after it had stored a file stores no second one if it meets the same
events again.

A file is gzip over lines of JSON, one for each event: `zcat FILE | jq -r 'select(.id == "evt_...").body'` reads it
without this program. Its name is `YYYY/MM/DD/FIRST_LAST_CHECKSUM.jsonl.gz`.
"""

import hashlib
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import orjson

from firstclaim.errors import ArchiveUnavailable
from firstclaim.operations.archive_storage import Storage

FILE_EVENTS_MOST = 10_000
FILE_MOST_BYTES = 8 * 1024 * 1024  # compressed: some 10,000 events of 5 kB
_LEVEL = 6  # level 9 saves 2% more and takes twice the time
_GZIP = 31  # zlib's window bits for gzip
_INSTANT = "%Y%m%dT%H%M%S.%fZ"
_SUFFIX = ".jsonl.gz"


@dataclass(frozen=True, slots=True)
class ArchivedEvent:
    """A payload, and what the ledger knew of its event when it was pruned."""

    id: str
    type: str
    account: str | None
    livemode: bool
    endpoint: str | None
    status: str
    received_at: datetime
    settled_at: datetime
    traceparent: str | None
    headers: str | None
    body: bytes = field(repr=False)

    def line(self) -> bytes:
        """As a line of a file. A body that is no UTF-8 is in `body_base64`."""
        content: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__ if name != "body"}
        try:
            content["body"] = self.body.decode()
        except UnicodeDecodeError:
            content["body_base64"] = b64encode(self.body).decode()
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z)

    @classmethod
    def of(cls, line: bytes) -> "ArchivedEvent":
        """From a line of a file. Raises ValueError. Fields of a newer build are left out."""
        content = orjson.loads(line)
        encoded = content.get("body_base64")
        content["body"] = content["body"].encode() if encoded is None else b64decode(encoded)
        for name in ("received_at", "settled_at"):
            content[name] = datetime.fromisoformat(content[name])
        return cls(**{name: content[name] for name in cls.__slots__})


class ArchiveFile:
    """A file that is being written, in memory: compressed at once, so that it holds some megabytes at most."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._first = self._last = datetime.min.replace(tzinfo=UTC)
        self._compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self._content = bytearray()

    def add(self, event: ArchivedEvent) -> None:
        """One more event, of the same day as the others."""
        self._first = min(self._first, event.received_at) if self.ids else event.received_at
        self._last = max(self._last, event.received_at)
        self.ids.append(event.id)
        self._content += self._compressor.compress(event.line())

    @property
    def is_full(self) -> bool:
        """Whether it should be stored before another event is added."""
        return len(self.ids) >= FILE_EVENTS_MOST or len(self._content) >= FILE_MOST_BYTES

    def finish(self) -> tuple[str, bytes]:
        """Its name and its content; nothing can be added any more."""
        content = bytes(self._content + self._compressor.flush())
        checksum = hashlib.sha256(content).hexdigest()[:16]
        times = "_".join(each.astimezone(UTC).strftime(_INSTANT) for each in (self._first, self._last))
        return f"{_folder(self._first)}/{times}_{checksum}{_SUFFIX}", content


def day_of(event: ArchivedEvent) -> date:
    """The day of its file, in UTC."""
    return event.received_at.astimezone(UTC).date()


async def store(storage: Storage, file: ArchiveFile) -> str:
    """Store the file; its name. When this returns, it is stored. Raises `ArchiveUnavailable`."""
    name, content = file.finish()
    await storage.put(name, content)
    return name


async def find(storage: Storage, event_id: str, received_at: datetime | date) -> ArchivedEvent | None:
    """The event in the archive, or None. By the day alone, all files of the day are read.

    Raises `ArchiveUnavailable`, also if a file is damaged.
    """
    for name in await storage.names(_folder(received_at)):
        if name.endswith(_SUFFIX) and (not isinstance(received_at, datetime) or _covers(name, received_at)):
            for line in _lines(name, await storage.get(name)):
                if event_id.encode() in line and (event := _read(name, line)).id == event_id:
                    return event
    return None


def _folder(at: datetime | date) -> str:
    day = at.astimezone(UTC).date() if isinstance(at, datetime) else at
    return f"{day:%Y/%m/%d}"


def _covers(name: str, at: datetime) -> bool:
    """Whether the file's times include this one. A name that somebody has changed is read, to be safe."""
    try:
        first, last, _ = name.rpartition("/")[2].split("_")
        return datetime.strptime(first, _INSTANT) <= at.astimezone(UTC).replace(tzinfo=None) <= _end(last)  # noqa: DTZ007
    except ValueError:
        return True


def _end(last: str) -> datetime:
    return datetime.strptime(last, _INSTANT) + timedelta(microseconds=1)  # noqa: DTZ007


def _lines(name: str, content: bytes) -> Iterator[bytes]:
    try:
        whole = zlib.decompress(content, _GZIP)
    except zlib.error as error:
        raise ArchiveUnavailable(f"{name}: the file is damaged ({error})") from error
    yield from whole.splitlines()


def _read(name: str, line: bytes) -> ArchivedEvent:
    try:
        return ArchivedEvent.of(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchiveUnavailable(f"{name}: a line is no archived event ({type(error).__name__})") from error
