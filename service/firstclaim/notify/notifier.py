"""The loop that gathers notices in the ledger and sends them: in each process that has the address.

Guarantees: a notice is in the ledger before it is sent, and stays there until the receiver has taken it, so that it is
sent at least once, under one id. One notice for each subject and `QUIET_SECONDS`: what happens in between is counted. A
receiver that is unreachable gets one request per backoff from each process, and the ledger has no more rows than
subjects. Nothing here delays a delivery or a round of recovery.
"""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import structlog
from pydantic import SecretStr

from firstclaim.backoff import Backoff
from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.ledger import Ledger
from firstclaim.notify import statements
from firstclaim.notify.notice import Notice
from firstclaim.notify.refusals import Refusals
from firstclaim.notify.sender import Sender
from firstclaim.observability.redaction import describe_error

log = structlog.get_logger(__name__)

INTERVAL_SECONDS: Final = 5.0  # between two looks: with the times below, an operator knows within a minute
FAILING_SECONDS: Final = 20.0  # an event that fails for longer: by then two or three retries have failed too
SETTLED_SECONDS: Final = 10.0  # longer than a COMMIT takes: an attempt is read so long after its end
QUIET_SECONDS: Final = {"event_dead": 300.0, "handler": 60.0, "signatures": 3600.0}
_BACKOFF: Final = Backoff(5, 300)
_LEASE_SECONDS: Final = 60.0  # of a notice that is being sent; longer than a request takes
_MOST_READ: Final = 1000  # attempts in one statement: some hundredths of a second
_MOST_READS: Final = 20  # statements in one look
_MOST_LOOKED_AT: Final = 50  # waiting events of a type in one look
_MOST_WATCHED: Final = 20  # events by which the recovery of a handler is seen
_MOST_SENT: Final = 20  # requests within `_RATE_SECONDS`, whatever there is to report
_RATE_SECONDS: Final = 300.0


class Notifier:
    """The loop of one process. Without an address there is nothing to do: another process may have one."""

    def __init__(self, ledger: Ledger, url: SecretStr | None, backoff: Backoff = _BACKOFF) -> None:
        self._ledger = ledger
        self._url = url
        self._backoff = backoff
        self._refusals = Refusals()
        self._failures = 0
        self._resume_at = 0.0
        self._sent_at: deque[float] = deque(maxlen=_MOST_SENT)
        self._unwritten: dict[str, tuple[int, frozenset[str]]] = {}  # refusals, by kind
        self._topics = list(QUIET_SECONDS)  # of which nothing was sent for longest, first

    async def run(self) -> None:
        """Gather and send until cancelled."""
        if self._url is None:
            return
        sender = Sender(self._url.get_secret_value())
        try:
            while True:
                try:
                    await self.gather()
                    while await self.send_next(sender):
                        pass
                except LedgerUnavailable:
                    pass  # recovery logs it
                except Exception as error:  # noqa: BLE001  (a notice that breaks must not end those to come)
                    log.error("notify_broke", error=describe_error(error))
                await asyncio.sleep(INTERVAL_SECONDS * random.uniform(0.75, 1))  # noqa: S311  (so that not all look at once)
        finally:
            await sender.close()

    # -- gathering --------------------------------------------------------------------------------------

    async def gather(
        self, *, settled_seconds: float = SETTLED_SECONDS, failing_seconds: float = FAILING_SECONDS
    ) -> None:
        """Write to the ledger what there is to report. Raises `LedgerUnavailable`."""
        refused = self._refusals.take()
        for reason, requests in refused.by_kind.items():
            before, endpoints = self._unwritten.get(reason, (0, frozenset()))
            self._unwritten[reason] = before + requests, endpoints | refused.endpoints
        for reason, (requests, endpoints) in list(self._unwritten.items()):
            await self._ledger.run(statements.REFUSED, reason=reason, requests=requests, endpoints=sorted(endpoints))
            del self._unwritten[reason]
        await self._ledger.run(statements.BEGIN)
        for _ in range(_MOST_READS):
            [row] = await self._ledger.run(statements.GATHER_DEAD, settled=settled_seconds, limit=_MOST_READ)
            if row["count"] < _MOST_READ:
                break
        await self._gather_handlers(failing_seconds)
        await self._ledger.run(statements.FORGET)

    async def _gather_handlers(self, failing_seconds: float) -> None:
        by_handler: dict[str, list[Any]] = {}
        for abandoned, statement in statements.FAILING.items():
            queues = await self._ledger.queues(abandoned=abandoned)
            types, livemodes = zip(*queues, strict=True) if queues else ((), ())
            for row in await self._ledger.run(
                statement, types=types, livemodes=livemodes, limit=_MOST_LOOKED_AT, for_seconds=failing_seconds
            ):
                by_handler.setdefault(row["handler"], []).append(row)
        for handler, rows in by_handler.items():
            if any(row["lasting"] for row in rows):
                await self._begins_to_fail(handler, rows)
        await self._ledger.run(statements.RECOVERS, failing=list(by_handler))

    async def _begins_to_fail(self, handler: str, rows: Sequence[Any]) -> None:
        first = min(rows, key=lambda row: row["since"])
        names = ("handler", "error_class", "place", "group", "type")
        detail = {
            "kind": "handler_failing",
            **{name: first[name] for name in names},
            "example_id": first["event_id"],
            "watched": [row["event_id"] for row in rows[:_MOST_WATCHED]],
        }
        await self._ledger.run(
            statements.BEGINS_TO_FAIL, handler=handler, since=first["since"], detail=json.dumps(detail)
        )

    # -- sending ----------------------------------------------------------------------------------------

    async def send_next(self, sender: Sender) -> bool:
        """Send the next notice that is due. Returns whether there may be another. Raises `LedgerUnavailable`."""
        now = time.monotonic()
        full = len(self._sent_at) == _MOST_SENT and now - self._sent_at[0] < _RATE_SECONDS
        if full or now < self._resume_at:
            return False
        rows = await self._ledger.run(statements.TAKE, lease=_LEASE_SECONDS, topics=self._topics)
        if not rows:
            return False
        notice = Notice(rows[0]["topic"], rows[0]["notice_id"], json.loads(rows[0]["content"]), rows[0]["tries"])
        self._sent_at.append(now)
        self._topics.sort(key=notice.topic.__eq__)  # it is the last now
        reason = await sender.send(notice)
        if reason is None:
            self._failures = 0
            log.info("notified", kind=notice.kind, notice_id=notice.notice_id, tries=notice.tries)
            await self._ledger.run(statements.SENT, notice_id=notice.notice_id, quiet=QUIET_SECONDS[notice.topic])
            return True
        self._failures += 1
        wait = self._backoff.after(self._failures)
        self._resume_at = time.monotonic() + wait
        log.warning("notify_failed", kind=notice.kind, notice_id=notice.notice_id, tries=notice.tries, error=reason)
        await self._ledger.run(statements.POSTPONED, notice_id=notice.notice_id, wait=wait)
        return False
