"""Stripe's list of events on a loopback address, over real HTTP, with every failure that a test needs.

Guarantees: it lists events as Stripe documents it (newest first, `created`, `delivery_success`, `limit`,
`starting_after`, `has_more`), accepts one key, and stores every query. The responses in `troubles` replace the next
responses.

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
Trouble = bytes | None  # sent instead of the list; None: close the connection; FROZEN: send nothing


def response(
    status: int, content: object = None, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """An HTTP response with `content` as JSON, or with exactly this body."""
    body = orjson.dumps(content) if body is None else body
    given = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    given |= headers or {}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status} Response\r\n{lines}\r\n".encode() + body


def error(
    status: int, code: str = "", param: str = "", message: str = "", headers: Mapping[str, str] | None = None
) -> bytes:
    """An error as Stripe formats it."""
    fields = {"type": "invalid_request_error", "code": code, "param": param, "message": message}
    return response(status, {"error": {name: value for name, value in fields.items() if value}}, headers=headers)


@dataclass(frozen=True, slots=True)
class StripeEvent:
    """An event at Stripe: the JSON in its list, the creation time, and whether every endpoint accepted it."""

    event_id: str
    created: int
    body: bytes = field(repr=False)
    delivered: bool = False


@dataclass(slots=True)
class StripeApi:
    """The server. `page_most` limits a page, whatever the query asks for."""

    max_page: int = 100
    events: list[StripeEvent] = field(default_factory=list)  # by creation
    troubles: list[Trouble] = field(default_factory=list)
    queries: list[dict[str, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    pages: int = 0  # responses that contained events
    on_page: Callable[[int], None] | None = None  # called with the number of such a response, before it is sent
    base: str = ""
    _server: asyncio.Server | None = None

    def add(self, body: bytes, created: int, event_id: str, *, delivered: bool = False) -> None:
        """Add an event, newer than those of the same second."""
        self.events.append(StripeEvent(event_id, created, body, delivered))

    def die(self) -> None:
        """Refuse every connection from now on."""
        assert self._server is not None
        self._server.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["StripeApi"]:
        """Listen at `base` during the block."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        async with self._server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *rest = head.split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in rest)}
            response_bytes = self._respond(line.split(" ")[1], headers)
            if response_bytes is FROZEN:
                await reader.read()  # until the client gives up
            elif response_bytes is not None:
                writer.write(response_bytes)
                await writer.drain()
        finally:
            writer.close()

    def _respond(self, target: str, headers: Mapping[str, str]) -> Trouble:
        parts = urlsplit(target)
        queries = dict(parse_qsl(parts.query))
        self.queries.append(queries)
        self.keys.add(headers["authorization"])
        if self.troubles:
            return self.troubles.pop(0)
        if headers["authorization"] != f"Bearer {KEY}":
            return error(401, message=f"Invalid API Key provided: {headers['authorization']}")
        if parts.path != "/v1/events":
            return error(404)
        return self._list(queries)

    def _list(self, queries: Mapping[str, str]) -> bytes:
        newest_first = sorted(enumerate(self.events), key=lambda each: (each[1].created, each[0]), reverse=True)
        found = [each for _, each in newest_first if _wanted(each, queries)]
        if (after := queries.get("starting_after")) is not None:
            ids = [each.event_id for each in found]
            if after not in ids:
                return error(400, "resource_missing", "starting_after", f"No such event: {after}")
            found = found[ids.index(after) + 1 :]
        limit = min(self.max_page, int(queries.get("limit", 10)))
        page = found[:limit]
        more = b"true" if len(found) > limit else b"false"
        if page:
            self.pages += 1
            if self.on_page is not None:
                self.on_page(self.pages)
        events = b",\n".join(each.body for each in page)
        body = b'{"object": "list", "data": [%s], "has_more": %s, "url": "/v1/events"}' % (events, more)
        return response(200, body=body, headers={"Request-Id": "req_fake"})


_BOUNDS: Final[Mapping[str, Callable[[int, int], bool]]] = {"gte": ge, "gt": gt, "lte": le, "lt": lt}


def _wanted(event: StripeEvent, queries: Mapping[str, str]) -> bool:
    for name, holds in _BOUNDS.items():
        if (bound := queries.get(f"created[{name}]")) is not None and not holds(event.created, int(bound)):
            return False
    success = queries.get("delivery_success")
    return success is None or event.delivered == (success == "true")
