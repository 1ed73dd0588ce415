"""Stripe's list of events on the loopback, over real HTTP, and every way in which it can go wrong.

Guarantees: it lists as Stripe documents it (newest first, `created`, `delivery_success`, `limit`, `starting_after`,
`has_more`), takes one key, and notes what it was asked; what a test puts into `troubles` answers the next requests
instead of the list.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import orjson

KEY: Final = "rk_test_c4nr34d3v3nts"

FROZEN: Final = b"frozen"
Trouble = bytes | None  # what to write instead of an answer; None: hang up without a word; FROZEN: say nothing


def answer(
    status: int, content: object = None, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """An HTTP answer: `content` as JSON, or this very body."""
    body = orjson.dumps(content) if body is None else body
    given = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    given |= headers or {}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status} AnswerResult\r\n{lines}\r\n".encode() + body


def error(
    status: int, code: str = "", param: str = "", message: str = "", headers: Mapping[str, str] | None = None
) -> bytes:
    """An error as Stripe words it."""
    told = {"type": "invalid_request_error", "code": code, "param": param, "message": message}
    return answer(status, {"error": {name: value for name, value in told.items() if value}}, headers=headers)


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event that Stripe has: the JSON that it lists, when it came to be, and whether every endpoint took it."""

    event_id: str
    created: int
    body: bytes = field(repr=False)
    delivered: bool = False


@dataclass(slots=True)
class StripeApi:
    """The server. `page_most`: it never gives more in a page, whatever it is asked for."""

    page_most: int = 100
    events: list[EventRow] = field(default_factory=list)  # in the order in which they came to be
    troubles: list[Trouble] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    pages: int = 0  # that had events in them
    on_page: Callable[[int], None] | None = None  # told the number of each of those, after it was answered
    base: str = ""
    _server: asyncio.Server | None = None

    def add(self, body: bytes, created: int, event_id: str, *, delivered: bool = False) -> None:
        """One more event, newer than those of the same second."""
        self.events.append(EventRow(event_id, created, body, delivered))

    def die(self) -> None:
        """Refuse every connection from now on."""
        assert self._server is not None
        self._server.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["StripeApi"]:
        """While the block runs, at `base`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        async with self._server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *rest = head.split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in rest)}
            said = self._answer(line.split(" ")[1], headers)
            if said is FROZEN:
                await reader.read()  # until the other side gives up
            elif said is not None:
                writer.write(said)
                await writer.drain()
        finally:
            writer.close()

    def _answer(self, target: str, headers: Mapping[str, str]) -> Trouble:
        parts = urlsplit(target)
        asked = dict(parse_qsl(parts.query))
        self.asked.append(asked)
        self.keys.add(headers["authorization"])
        if self.troubles:
            return self.troubles.pop(0)
        if headers["authorization"] != f"Bearer {KEY}":
            return error(401, message=f"Invalid API Key provided: {headers['authorization']}")
        if parts.path != "/v1/events":
            return error(404)
        return self._list(asked)

    def _list(self, asked: Mapping[str, str]) -> bytes:
        newest_first = sorted(enumerate(self.events), key=lambda each: (each[1].created, each[0]), reverse=True)
        found = [each for _, each in newest_first if _wanted(each, asked)]
        if (after := asked.get("starting_after")) is not None:
            ids = [each.event_id for each in found]
            if after not in ids:
                return error(400, "resource_missing", "starting_after", f"No such event: {after}")
            found = found[ids.index(after) + 1 :]
        most = min(self.page_most, int(asked.get("limit", 10)))
        page = found[:most]
        more = b"true" if len(found) > most else b"false"
        if page:
            self.pages += 1
            if self.on_page is not None:
                self.on_page(self.pages)
        events = b",\n".join(each.body for each in page)
        body = b'{"object": "list", "data": [%s], "has_more": %s, "url": "/v1/events"}' % (events, more)
        return answer(200, body=body, headers={"Request-Id": "req_fake"})


_BOUNDS: Final[Mapping[str, Callable[[int, int], bool]]] = {"gte": ge, "gt": gt, "lte": le, "lt": lt}


def _wanted(event: EventRow, asked: Mapping[str, str]) -> bool:
    for name, holds in _BOUNDS.items():
        if (bound := asked.get(f"created[{name}]")) is not None and not holds(event.created, int(bound)):
            return False
    success = asked.get("delivery_success")
    return success is None or event.delivered == (success == "true")
