"""Reconciliation: what Stripe's list of events has and the ledger has not is recorded, as a delivery would have been.

Guarantees: nothing here dispatches, and no row that is there is touched: what is missing becomes `pending`, and the
running services take it up. Oldest first, because they take up first what is due the longest. No progress is kept
anywhere: a run that was interrupted is simply made again, finds what it recorded already here, and goes on.

Stripe lists the newest first, so time is walked in windows from old to new, and each is read to its end before it is
recorded. Only what is missing is held meanwhile, and a window that has more of it than may be held is read again as a
shorter one: 30 days of millions of events need no more memory than a day of thousands. The last window is open: what
is created while the run goes on is in it, or is left to its delivery and to the next run.
"""

import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from firstclaim.errors import Rejected, StripeUnavailable
from firstclaim.event import Delivery, parse_event
from firstclaim.observability.redaction import redact
from firstclaim.operations.commands import BATCH, Commands
from firstclaim.operations.stripe_api import Item, Page, StripeEvents

REFUSED_NAMED_MOST = 100
_HELD_MOST_BYTES = 32 * 1024 * 1024  # of missing events' bodies: some thousands of them
_FIRST_WINDOW_SECONDS = 3600
_WINDOW_MOST_SECONDS = 86_400  # bounds what is read twice where many missing events follow on none


@dataclass(frozen=True, slots=True)
class ReconcileOptions:
    """What is to be reconciled. `undelivered`: only what some endpoint has not taken yet, as Stripe sees it."""

    since_seconds: int
    undelivered: bool = False

    def __str__(self) -> str:
        """In the words of the command line, for the audit."""
        return f"since={self.since_seconds}s" + (" undelivered" if self.undelivered else "")


@dataclass(slots=True)
class ReconcileProgress:
    """How far it has come: `found` = already here + missing + refused; `covered` is the share of the time, 0 to 1.

    `refused` names the first of those that no delivery could have brought in either, each with the reason.
    """

    found: int = 0
    missing: int = 0
    recorded: int = 0
    refused_events: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    covered: float = 0

    @property
    def already_here(self) -> int:
        """In the ledger before, or brought by a delivery in the moment before they were recorded."""
        return self.found - self.refused_events - self.missing


@dataclass(slots=True)
class _Window:
    """All that Stripe has of a stretch of time: how many events, and those of them that the ledger has not."""

    found: int = 0
    missing: list[Delivery] = field(default_factory=list)  # the newest first
    refused: list[tuple[str, str]] = field(default_factory=list)
    held_bytes: int = 0


class Reconciliation:
    """One run over a ledger and a list; what came of it stands in `progress`, also when it did not come to its end."""

    def __init__(
        self,
        operations: Commands,
        events: StripeEvents,
        asked: ReconcileOptions,
        *,
        body_most_bytes: int,
        give_up_seconds: float,
    ) -> None:
        self._operations = operations
        self._events = events
        self._asked = asked
        self._body_most_bytes = body_most_bytes
        self._give_up_seconds = give_up_seconds
        self.progress = ReconcileProgress()

    async def run(self, operator: str, *, dry_run: bool = False) -> AsyncIterator[ReconcileProgress]:
        """Go through the time that was asked for; yields whenever `progress` has changed.

        `operator` is noted in the audit; `dry_run`: nothing is noted and nothing recorded. Raises `StripeRefused`,
        `StripeUnavailable` and what Postgres raises; what was recorded until then stays.
        """
        recording = self._operations.recording(operator, str(self._asked), give_up_seconds=self._give_up_seconds)
        async with nullcontext() if dry_run else recording as record:
            async for window in self._windows():
                missing = window.missing[::-1]
                self.progress.found += window.found
                self.progress.missing += len(missing)
                self.progress.refused_events += len(window.refused)
                self.progress.refused += window.refused[: REFUSED_NAMED_MOST - len(self.progress.refused)]
                while record is not None and missing:
                    batch, missing = missing[:BATCH], missing[BATCH:]
                    new = await record(batch)
                    self.progress.recorded += new
                    self.progress.missing -= len(batch) - new  # a delivery of it was faster
                    yield self.progress
                yield self.progress

    async def _windows(self) -> AsyncIterator[_Window]:
        """All the time that was asked for, from old to new."""
        now = int(time.time())
        start, length = now - self._asked.since_seconds, _FIRST_WINDOW_SECONDS
        while start < now:
            end = min(start + length, now)
            window = await self._read(start, None if end == now else end, divisible=end - start > 1)
            if window is None:
                length = max(1, (end - start) // 4)
                continue
            start = end
            self.progress.covered = 1 - (now - start) / self._asked.since_seconds
            if window.held_bytes < _HELD_MOST_BYTES // 4:
                length = min(length * 2, _WINDOW_MOST_SECONDS)
            yield window

    async def _read(self, start: int, end: int | None, *, divisible: bool) -> _Window | None:
        """All of a window, page by page; None: it has to be read again, as a shorter one."""
        window, cursor, cursors = _Window(), None, set[str]()
        while True:
            page = await self._events.page(start, end, cursor, undelivered=self._asked.undelivered)
            if page is None and divisible:
                return None
            if page is None or page.cursor in cursors:
                raise StripeUnavailable("Stripe's list of events changes under our hands or repeats itself: try again")
            await self._take(page, window)
            if page.cursor is None:
                return window
            if divisible and window.held_bytes > _HELD_MOST_BYTES:
                return None
            cursor = page.cursor
            cursors.add(cursor)

    async def _take(self, page: Page, window: _Window) -> None:
        deliveries: list[Delivery] = []
        for item in page.items:
            try:
                deliveries.append(self._delivery(item))
            except Rejected as rejected:
                window.refused.append((redact(item.event_id), rejected.reason))
        known = await self._operations.recorded_ids([each.event.id for each in deliveries])
        missing = [each for each in deliveries if each.event.id not in known]
        window.found += len(page.items)
        window.missing += missing
        window.held_bytes += sum(len(each.body) for each in missing)

    def _delivery(self, item: Item) -> Delivery:
        """As the webhook's path would have taken it in; raises `Rejected`."""
        if len(item.body) > self._body_most_bytes:
            raise Rejected("content", "larger than FIRSTCLAIM_BODY_MOST_BYTES", 413)
        return Delivery(parse_event(item.body), item.body)
