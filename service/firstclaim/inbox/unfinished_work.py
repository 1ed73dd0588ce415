"""The outcome of work that an error has ended: nothing is promised, so Stripe sends the event again."""

from typing import Final

import structlog

from firstclaim import outcome
from firstclaim.errors import LedgerUnavailable
from firstclaim.observability.redaction import describe_error
from firstclaim.outcome import Outcome

log = structlog.get_logger(__name__)

LEDGER_UNREACHABLE: Final = outcome.unavailable("The ledger cannot be reached")


def unavailable(error: BaseException, event_id: str, event_type: str, log_event: str) -> Outcome:
    """The outcome after `error`: nothing is promised, so Stripe retries. A cancellation is raised again."""
    if isinstance(error, LedgerUnavailable):
        log.warning("ledger_unavailable", event_id=event_id, type=event_type, error=str(error))
        return LEDGER_UNREACHABLE
    if not isinstance(error, Exception):
        raise error
    log.error(log_event, event_id=event_id, type=event_type, error=describe_error(error))
    return outcome.unavailable("Internal error")
