"""The record of a run: every delivery, its answer, and the event's row in the ledger at that instant.

Guarantees: the record is append-only. The ledger is read as soon as an answer arrives, before anything else happens
with it. A delivery without an answer (its process was killed, its connection was cut) is recorded as such. All
instants are on the machine's monotonic clock, in nanoseconds, like the lines of the trace, so that both can be put
in one order.
"""

import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

import httpx

from firstclaim.errors import FirstclaimError
from firstclaim.event import parse_event
from firstclaim.inbox.routes import Routes
from firstclaim.postgres.connection import UNAVAILABLE
from firstclaim.registry import Handler, Registry
from tests.acceptance.harness import HANDLERS, Answer, Overrides, Row, Sample, Sandbox, Service, post
from tests.chaos import trace

TRACED_HANDLERS: Final = f"tests.chaos.trace,{HANDLERS}"
ABANDONED_MOST: Final = 8  # as shipped


class Unseen(Enum):
    """Why no row was seen."""

    NO_ROW = "no row"
    NOT_READ = "not read: the test had made the ledger unreachable"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One POST of an event. `result` holds status, processed and action of the answer; None if there was no answer.

    The row was read at an instant between `answered_at` and `seen_at`. `wanted`: the service has a handler for it.
    """

    event_id: str
    service: str
    sent_at: int
    answered_at: int
    result: tuple[int, bool, str] | None
    seen: Row | Unseen
    seen_at: int
    wanted: bool

    @property
    def promised(self) -> bool:
        """Whether it was answered with a 2xx."""
        return self.result is not None and 200 <= self.result[0] < 300


@dataclass(slots=True)
class History:
    """The record of one run on `sandbox`. Its services write the file `trace`; `look` reads a row of the ledger."""

    sandbox: Sandbox
    trace: Path = field(init=False)
    look: Callable[[Sample], Awaitable[Row | None]] = field(init=False)
    deliveries: list[Delivery] = field(default_factory=list, init=False)
    lost: dict[str, int] = field(default_factory=dict, init=False)  # event id: the instant at which the ledger lost it
    abandoned_most: int = field(default=ABANDONED_MOST, init=False)
    _postgres_unreachable: int = field(default=0, init=False)
    _unread: bool = field(default=False, init=False)
    _routes: dict[str, Routes] = field(default_factory=dict, init=False)  # by the name of the service

    def __post_init__(self) -> None:
        self.trace = self.sandbox.folder / f"trace-{secrets.token_hex(4)}.jsonl"
        self.look = self.sandbox.row

    def service(self, overrides: Overrides | None = None, *options: str, workers: int = 1) -> Service:
        """Like `Sandbox.service`; the service writes to the trace."""
        traced: Overrides = {"handlers": TRACED_HANDLERS, trace.VARIABLE: str(self.trace)}
        chosen = traced | (overrides or {})
        self.abandoned_most = min(self.abandoned_most, int(chosen.get("abandoned_most", ABANDONED_MOST)))
        service = self.sandbox.service(chosen, *options, workers=workers)
        self._routes[service.name] = Routes(Registry.load(str(chosen["handlers"]).split(",")), "any")
        return service

    async def deliver(self, service: Service, event: Sample) -> Answer | None:
        """POST it, read the ledger at once, record both. None when the connection ended without an answer."""
        sent_at = time.monotonic_ns()
        answer: Answer | None = None
        with contextlib.suppress(httpx.TransportError):
            answer = await post(service.url, event.body)
        await self.note(service, event, answer, sent_at)
        return answer

    async def note(self, service: Service, event: Sample, answer: Answer | None, sent_at: int | None = None) -> None:
        """Record an answer that was received in another way; call it as soon as the answer has arrived."""
        answered_at = time.monotonic_ns()
        if sent_at is None:
            sent_at = answered_at - round(1e9 * answer.seconds) if answer else answered_at
        seen = await self._seen(event) if answer else Unseen.NOT_READ
        result = answer.result if answer else None
        seen_at, wanted = time.monotonic_ns(), self._is_wanted(service, event)
        noted = Delivery(event.id, service.name, sent_at, answered_at, result, seen, seen_at, wanted)
        self.deliveries.append(noted)

    async def note_all(self, posts: Sequence[tuple[Service, Sample]], answers: Iterable[Answer]) -> None:
        """Record the answers of the harness's `post_at_once`."""
        for (service, event), answer in zip(posts, answers, strict=True):
            await self.note(service, event, answer)

    @contextlib.contextmanager
    def postgres_unreachable(self) -> Iterator[None]:
        """While the block runs, the test may make Postgres unreachable, and then the ledger cannot be read."""
        self._postgres_unreachable += 1
        try:
            yield
        finally:
            self._postgres_unreachable -= 1

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """While the block runs, no row is read, because there is no server that surely has it: it fails over."""
        self._unread = True
        try:
            yield
        finally:
            self._unread = False

    def restored(self, lost: Iterable[Sample]) -> None:
        """The ledger was restored to a moment before these: what was seen of them until now no longer counts."""
        self.lost |= {event.id: time.monotonic_ns() for event in lost}

    def _is_wanted(self, service: Service, event: Sample) -> bool:
        try:
            return isinstance(self._routes[service.name].find(parse_event(event.body)), Handler)
        except FirstclaimError:  # no event: it is not accepted either
            return False

    async def _seen(self, event: Sample) -> Row | Unseen:
        tolerant = self._postgres_unreachable > 0
        if self._unread:
            return Unseen.NOT_READ
        try:
            return await self.look(event) or Unseen.NO_ROW
        except UNAVAILABLE:
            if tolerant or self._postgres_unreachable:
                return Unseen.NOT_READ
            raise
