"""Recovery: the loop that dispatches due events without a delivery from Stripe. Every process runs it; none leads.

Guarantees: neither a bad row nor a restarted server ends the loop. `healthy` says whether its rounds succeed. It also
confirms the ledger's epoch, without which no marker counts.
"""

import asyncio
import contextlib
import random
import time

import structlog

from firstclaim.errors import LedgerUnavailable
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.slots import Slots
from firstclaim.observability import metrics
from firstclaim.observability.redaction import describe_error
from firstclaim.postgres.epoch import Epoch

log = structlog.get_logger(__name__)

_MAX_MISSED_ROUNDS = 10  # longer than a restart of Postgres takes, in intervals
_ROUND_SECONDS = 5  # the time that the round itself may take


class Recovery:
    """The loop of one process: every `interval_seconds`, and after a full round as soon as there is capacity.

    A round makes at most `batch` abandoned events due again, and none before Postgres has been reachable for a lease
    without a break. A round that finds nothing to do sends one statement.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        ledger: Ledger,
        slots: Slots,
        epoch: Epoch,
        *,
        interval_seconds: float,
        lease_seconds: float,
        batch: int,
    ) -> None:
        self._pipeline = pipeline
        self._ledger = ledger
        self._slots = slots
        self._epoch = epoch
        self._interval_seconds = interval_seconds
        self._lease_seconds = lease_seconds
        self._batch = batch
        self._last_round = time.monotonic()
        self._failing = False
        self._upkeep_at = 0.0

    @property
    def healthy(self) -> bool:
        """Whether a round succeeded recently."""
        return self.idle_seconds < _MAX_MISSED_ROUNDS * self._interval_seconds + _ROUND_SECONDS

    @property
    def idle_seconds(self) -> float:
        """Seconds since a round last succeeded."""
        return time.monotonic() - self._last_round

    async def run(self) -> None:
        """Run rounds until cancelled."""
        while True:
            more = await self._round()
            # Jitter, so that processes started together do not query together for ever.
            pause = self._interval_seconds * random.uniform(1, 1.25)  # noqa: S311
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    if not more:
                        await self._slots.wait_for_work()
                    await self._slots.wait_for_capacity()

    async def _round(self) -> bool:
        """Run one round. Returns whether there may be more to do right away."""
        survey = None
        try:
            if time.monotonic() >= self._upkeep_at:
                survey = await self._ledger.survey()
                self._epoch.confirm(survey.epoch)
                self._pipeline.pause(survey)
                # After an outage, a lease may be over although its process is alive and about to release the event.
                if survey.overdue and self._epoch.unbroken_seconds >= self._lease_seconds:
                    await self._pipeline.return_abandoned(self._batch)
                await self._pipeline.give_up_unwanted(survey, self._batch)
                self._upkeep_at = time.monotonic() + self._interval_seconds / 2
            more = await self._pipeline.recover(survey)
        except LedgerUnavailable as error:
            self._note_failure(str(error))
            return False
        except Exception as error:  # noqa: BLE001  (a bad row must not end recovery of all others)
            self._note_failure(describe_error(error))
            return False
        if self._failing:
            log.info("recovery_back")
        self._failing = False
        self._last_round = time.monotonic()
        metrics.recovery_rounds["good"].inc()
        return more

    def _note_failure(self, error: str) -> None:
        metrics.recovery_rounds["failed"].inc()
        if not self._failing:
            log.warning("recovery_round_failed", error=error)
        self._failing = True
