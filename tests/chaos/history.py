"""What a run saw: every delivery that was sent, what it was answered, and what the ledger said at that instant.

Guarantees: append-only; the ledger is asked the moment an answer is in, before anything else is done with it; an
answer that never came (its process was killed, its connection cut) is on record as such. Every instant is on the
machine's monotonic clock, in nanoseconds, like the trace's lines: the two can be put in one order.
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

from firstclaim.postgres.connection import UNAVAILABLE
from tests.acceptance.harness import HANDLERS, Answer, Overrides, Row, Sample, Sandbox, Service, post
from tests.chaos import trace

TRACED_HANDLERS: Final = f"tests.chaos.trace,{HANDLERS}"
ABANDONED_MOST: Final = 8  # as shipped


class Unseen(Enum):
    """Why there is no row to show."""

    NO_ROW = "no row"
    NOT_READ = "the ledger could not be asked, by the test's own doing"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One POST of an event; `result` is the answer's status, processed and action, None if none came.

    What the ledger said is of an instant between `answered_at` and `seen_at`.
    """

    event_id: str
    service: str
    sent_at: int
    answered_at: int
    result: tuple[int, bool, str] | None
    seen: Row | Unseen
    seen_at: int

    @property
    def promised(self) -> bool:
        """Whether it was answered with a 2xx."""
        return self.result is not None and 200 <= self.result[0] < 300


@dataclass(slots=True)
class History:
    """Of one run on `sandbox`; `trace` is the file that its services write, `look` how the ledger is asked."""

    sandbox: Sandbox
    trace: Path = field(init=False)
    look: Callable[[Sample], Awaitable[Row | None]] = field(init=False)
    deliveries: list[Delivery] = field(default_factory=list, init=False)
    lost: dict[str, int] = field(default_factory=dict, init=False)  # event id: when the ledger lost it
    abandoned_most: int = field(default=ABANDONED_MOST, init=False)
    _postgres_away: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.trace = self.sandbox.folder / f"trace-{secrets.token_hex(4)}.jsonl"
        self.look = self.sandbox.row

    def service(self, overrides: Overrides | None = None, *options: str, workers: int = 1) -> Service:
        """A service on the sandbox, not started yet, that is traced; as `Sandbox.service` has it."""
        traced: Overrides = {"handlers": TRACED_HANDLERS, trace.VARIABLE: str(self.trace)}
        chosen = traced | (overrides or {})
        self.abandoned_most = min(self.abandoned_most, int(chosen.get("abandoned_most", ABANDONED_MOST)))
        return self.sandbox.service(chosen, *options, workers=workers)

    async def deliver(self, service: Service, event: Sample) -> Answer | None:
        """POST it, ask the ledger at once, note both; None when the connection ended without an answer."""
        sent_at = time.monotonic_ns()
        answer: Answer | None = None
        with contextlib.suppress(httpx.TransportError):
            answer = await post(service.url, event.body)
        await self.note(service, event, answer, sent_at)
        return answer

    async def note(self, service: Service, event: Sample, answer: Answer | None, sent_at: int | None = None) -> None:
        """Note an answer that was got in another way; call it as soon as it is in."""
        answered_at = time.monotonic_ns()
        if sent_at is None:
            sent_at = answered_at - round(1e9 * answer.seconds) if answer else answered_at
        seen = await self._seen(event) if answer else Unseen.NOT_READ
        result = answer.result if answer else None
        noted = Delivery(event.id, service.name, sent_at, answered_at, result, seen, time.monotonic_ns())
        self.deliveries.append(noted)

    async def note_all(self, posts: Sequence[tuple[Service, Sample]], answers: Iterable[Answer]) -> None:
        """Note what the harness's `post_at_once` brought."""
        for (service, event), answer in zip(posts, answers, strict=True):
            await self.note(service, event, answer)

    @contextlib.contextmanager
    def postgres_unreachable(self) -> Iterator[None]:
        """While the block runs, Postgres may be away by the test's own doing: it cannot always be asked."""
        self._postgres_away += 1
        try:
            yield
        finally:
            self._postgres_away -= 1

    def restored(self, lost: Iterable[Sample]) -> None:
        """The ledger was restored to a moment without these: what was seen of them so far binds nobody."""
        self.lost |= {event.id: time.monotonic_ns() for event in lost}

    async def _seen(self, event: Sample) -> Row | Unseen:
        tolerant = self._postgres_away > 0
        try:
            return await self.look(event) or Unseen.NO_ROW
        except UNAVAILABLE:
            if tolerant or self._postgres_away:
                return Unseen.NOT_READ
            raise
