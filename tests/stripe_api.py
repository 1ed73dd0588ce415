"""Stripe's API on the loopback interface, over real HTTP, with any failure that a test needs.

Guarantees: it lists events as Stripe documents it (newest first, `created`, `delivery_success`, `limit`,
`starting_after`, `has_more`), and returns the objects of `objects` by their path. It accepts one key, and keeps the
parameters and the heads of all requests. The next requests get the responses that a test puts into `responses`, instead
of the list or the object.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import orjson

KEY: Final = "rk_test_c4nr34d3v3nts"

FROZEN: Final = b"frozen"
Response = bytes | None  # what to send; None: close the connection; FROZEN: send nothing


def answer(
    status: int, content: object = None, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """An HTTP response: `content` as JSON, or `body` as it is."""
    body = orjson.dumps(content) if body is None else body
    given = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    given |= headers or {}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status} Reason\r\n{lines}\r\n".encode() + body


def error(
    status: int, code: str = "", param: str = "", message: str = "", headers: Mapping[str, str] | None = None
) -> bytes:
    """An error in Stripe's format."""
    fields = {"type": "invalid_request_error", "code": code, "param": param, "message": message}
    return answer(status, {"error": {name: value for name, value in fields.items() if value}}, headers=headers)


@dataclass(frozen=True, slots=True)
class StripeEvent:
    """An event in Stripe's list: its JSON, when it was created, and whether every endpoint accepted it."""

    event_id: str
    created: int
    body: bytes = field(repr=False)
    delivered: bool = False


@dataclass(slots=True)
class StripeApi:
    """The server. `page_most` limits a page, whatever limit a request has."""

    page_most: int = 100
    events: list[StripeEvent] = field(default_factory=list)  # in the order in which they were created
    responses: list[Response] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    objects: dict[str, object] = field(default_factory=dict)  # by path, e.g. /v1/invoices/in_1
    heads: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)  # the path and the headers
    key: str = KEY
    on_request: Callable[[], Awaitable[object]] | None = None  # awaited before each answer
    keys: set[str] = field(default_factory=set)
    pages: int = 0  # pages that had events
    on_page: Callable[[int], None] | None = None  # called with the number of each of those, before it is sent
    base: str = ""
    _server: asyncio.Server | None = None

    def add(self, body: bytes, created: int, event_id: str, *, delivered: bool = False) -> None:
        """Add an event; it is newer than those of the same second."""
        self.events.append(StripeEvent(event_id, created, body, delivered))

    def refuse_connections(self) -> None:
        """Refuse every connection from now on."""
        assert self._server is not None
        self._server.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["StripeApi"]:
        """Serve at `base` for the duration of the block."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        async with self._server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *rest = head.split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in rest)}
            response = self._answer(line.split(" ")[1], headers)
            if self.on_request is not None:
                await self.on_request()
            if response is FROZEN:
                await reader.read()  # until the client closes the connection
            elif response is not None:
                writer.write(response)
                await writer.drain()
        finally:
            writer.close()

    def _answer(self, target: str, headers: Mapping[str, str]) -> Response:
        url = urlsplit(target)
        parameters = dict(parse_qsl(url.query))
        self.requests.append(parameters)
        self.keys.add(headers["authorization"])
        self.heads.append((url.path, headers))
        if self.responses:
            return self.responses.pop(0)
        if headers["authorization"] != f"Bearer {self.key}":
            return error(401, message=f"Invalid API Key provided: {headers['authorization']}")
        if url.path in self.objects:
            return answer(200, self.objects[url.path], headers={"Request-Id": "req_fake"})
        if url.path != "/v1/events":
            return error(404, "resource_missing", "id", f"No such object: {url.path}")
        return self._list(parameters)

    def _list(self, parameters: Mapping[str, str]) -> bytes:
        newest_first = sorted(enumerate(self.events), key=lambda each: (each[1].created, each[0]), reverse=True)
        found = [each for _, each in newest_first if _matches(each, parameters)]
        if (after := parameters.get("starting_after")) is not None:
            ids = [each.event_id for each in found]
            if after not in ids:
                return error(400, "resource_missing", "starting_after", f"No such event: {after}")
            found = found[ids.index(after) + 1 :]
        limit = min(self.page_most, int(parameters.get("limit", 10)))
        page = found[:limit]
        more = b"true" if len(found) > limit else b"false"
        if page:
            self.pages += 1
            if self.on_page is not None:
                self.on_page(self.pages)
        events = b",\n".join(each.body for each in page)
        body = b'{"object": "list", "data": [%s], "has_more": %s, "url": "/v1/events"}' % (events, more)
        return answer(200, body=body, headers={"Request-Id": "req_fake"})


_BOUNDS: Final[Mapping[str, Callable[[int, int], bool]]] = {"gte": ge, "gt": gt, "lte": le, "lt": lt}


def _matches(event: StripeEvent, parameters: Mapping[str, str]) -> bool:
    for name, holds in _BOUNDS.items():
        if (bound := parameters.get(f"created[{name}]")) is not None and not holds(event.created, int(bound)):
            return False
    success = parameters.get("delivery_success")
    return success is None or event.delivered == (success == "true")
