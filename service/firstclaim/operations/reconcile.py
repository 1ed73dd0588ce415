"""Reconciliation: records the events that Stripe lists and the ledger does not have, as a delivery would record them.

Guarantees: nothing here dispatches, and no existing row is changed. A missing event becomes `pending`, and the running
services take it up. The oldest is recorded first, because services take up first what has been due longest. No
progress is stored: an interrupted run is started again, finds that what it recorded exists, and continues.

Stripe lists the newest event first. Therefore the time is split into windows, from old to new, and each window is read
to its end before it is recorded. Only missing events are buffered, and a window with more of them than may be buffered
is read again as a shorter one: 30 days of millions of events need no more memory than a day of thousands. The last
window is open: an event that is created during the run is in it, or is left to its delivery and to the next run.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from firstclaim.errors import Rejected, StripeUnavailable
from firstclaim.event import Delivery, parse_event
from firstclaim.observability.redaction import redact
from firstclaim.operations.commands import BATCH, Commands
from firstclaim.operations.stripe_api import EventPage, ListedEvent, StripeEvents

REFUSED_NAMED_MOST = 100
_BUFFER_MOST_BYTES = 32 * 1024 * 1024  # bodies of missing events: some thousands of them
_FIRST_WINDOW_SECONDS = 3600
_WINDOW_MOST_SECONDS = 86_400  # limits what is read twice when many missing events follow a time without any


@dataclass(frozen=True, slots=True)
class ReconcileOptions:
    """What to reconcile. `undelivered`: only events that, as Stripe sees it, some endpoint has not accepted yet.

    `endpoint`: the named endpoint that receives the events of the key's account; what is recorded gets its name.
    """

    since_seconds: int
    undelivered: bool = False
    endpoint: str | None = None

    def __str__(self) -> str:
        """As options of the command line, for the audit."""
        endpoint = "" if self.endpoint is None else f" endpoint={self.endpoint}"
        return f"since={self.since_seconds}s" + (" undelivered" if self.undelivered else "") + endpoint


@dataclass(slots=True)
class ReconcileProgress:
    """The progress of a run: `found` = already here + missing + refused; `covered` is the share of the time, 0 to 1.

    `refused` has the id and the reason of the first events that would be refused as a delivery too.
    """

    found: int = 0
    missing: int = 0
    recorded: int = 0
    ignored: int = 0  # of these, the events that this build has no handler for
    refused_events: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    covered: float = 0

    @property
    def already_here(self) -> int:
        """Events that were in the ledger, or that a delivery recorded just before this run would have."""
        return self.found - self.refused_events - self.missing


@dataclass(slots=True)
class _Window:
    """A stretch of time: how many events Stripe lists in it, and those that the ledger does not have."""

    found: int = 0
    missing: list[Delivery] = field(default_factory=list)  # the newest first
    refused: list[tuple[str, str]] = field(default_factory=list)
    missing_bytes: int = 0


class Reconciliation:
    """One run. `progress` has its result, also if the run was interrupted.

    `wants`: whether this build has a handler for a type and mode. Other events are recorded as `ignored`.
    """

    def __init__(
        self,
        operations: Commands,
        events: StripeEvents,
        options: ReconcileOptions,
        *,
        wants: Callable[[str, bool], bool],
        body_most_bytes: int,
        give_up_seconds: float,
    ) -> None:
        self._operations = operations
        self._events = events
        self._options = options
        self._wants = wants
        self._body_most_bytes = body_most_bytes
        self._give_up_seconds = give_up_seconds
        self.progress = ReconcileProgress()

    async def run(self, operator: str, *, dry_run: bool = False) -> AsyncIterator[ReconcileProgress]:
        """Reconcile the time that the options name; yields whenever `progress` has changed.

        `operator` is written to the audit. `dry_run`: nothing is audited and nothing recorded. Raises `StripeRefused`,
        `StripeUnavailable`, and the errors of Postgres; what was recorded until then stays recorded.
        """
        recording = self._operations.recording(
            operator, str(self._options), wants=self._wants, give_up_seconds=self._give_up_seconds
        )
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
                    self.progress.recorded += len(new)
                    self.progress.ignored += sum(not self._wanted(each) for each in batch if each.event.id in new)
                    self.progress.missing -= len(batch) - len(new)  # a delivery of them was faster
                    yield self.progress
                yield self.progress

    def _wanted(self, delivery: Delivery) -> bool:
        return self._wants(delivery.event.type, delivery.event.livemode)

    async def _windows(self) -> AsyncIterator[_Window]:
        """Windows over the whole time, from old to new."""
        now = int(time.time())
        start, length = now - self._options.since_seconds, _FIRST_WINDOW_SECONDS
        while start < now:
            end = min(start + length, now)
            window = await self._read(start, None if end == now else end, divisible=end - start > 1)
            if window is None:
                length = max(1, (end - start) // 4)
                continue
            start = end
            self.progress.covered = 1 - (now - start) / self._options.since_seconds
            if window.missing_bytes < _BUFFER_MOST_BYTES // 4:
                length = min(length * 2, _WINDOW_MOST_SECONDS)
            yield window

    async def _read(self, start: int, end: int | None, *, divisible: bool) -> _Window | None:
        """A whole window, page by page; None if it must be read again as a shorter one."""
        window, cursor, cursors = _Window(), None, set[str]()
        while True:
            page = await self._events.page(start, end, cursor, undelivered=self._options.undelivered)
            if page is None and divisible:
                return None
            if page is None or page.cursor in cursors:
                raise StripeUnavailable(
                    "Stripe's list of events changed while it was read, or repeats itself: try again"
                )
            await self._add_page(page, window)
            if page.cursor is None:
                return window
            if divisible and window.missing_bytes > _BUFFER_MOST_BYTES:
                return None
            cursor = page.cursor
            cursors.add(cursor)

    async def _add_page(self, page: EventPage, window: _Window) -> None:
        deliveries: list[Delivery] = []
        for listed in page.events:
            try:
                deliveries.append(self._delivery(listed))
            except Rejected as rejected:
                window.refused.append((redact(listed.event_id), rejected.reason))
        recorded = await self._operations.recorded_ids([each.event.id for each in deliveries])
        missing = [each for each in deliveries if each.event.id not in recorded]
        window.found += len(page.events)
        window.missing += missing
        window.missing_bytes += sum(len(each.body) for each in missing)

    def _delivery(self, listed: ListedEvent) -> Delivery:
        """The event as the webhook would parse it; raises `Rejected`."""
        if len(listed.body) > self._body_most_bytes:
            raise Rejected("content", "larger than FIRSTCLAIM_BODY_MOST_BYTES", 413)
        endpoint = self._options.endpoint
        return Delivery(parse_event(listed.body, endpoint), listed.body, endpoint=endpoint)
