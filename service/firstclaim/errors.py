"""Everything this service raises on purpose, grouped by who must act.

Expected outcomes (a duplicate, a failed handler, Redis away) are values, not exceptions: see
`firstclaim.inbox.pipeline.Outcome`. What is raised here means that somebody has to do something.
"""

from collections.abc import Sequence
from typing import Literal


class FirstclaimError(Exception):
    """The root: catch it at a boundary, never inside."""


# -- the caller must act ------------------------------------------------------------------------------


RejectedKind = Literal[
    "signature_missing",
    "signature_repeated",
    "signature_malformed",
    "signature_stale",
    "signature_mismatch",
    "body_not_utf8",
    "content",
    "path",
    "body_too_large",
    "body_too_slow",
    "head_too_large",
    "head_too_slow",
    "malformed",
    "pipelined",
    "upgrade",
]


class Rejected(FirstclaimError):
    """A delivery that is refused before anything was asked of Redis or Postgres.

    `status` is the HTTP status, `reason` the generic sentence the caller may read, `kind` a closed label
    for logs and metrics. None of them holds any of the caller's bytes, so logging one can leak nothing.
    """

    def __init__(self, kind: RejectedKind, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.status = status


# -- the operator must act ----------------------------------------------------------------------------


class OperatorError(FirstclaimError):
    """Shown on the terminal as one sentence, never as a traceback. `exit_code` is the command's."""

    exit_code = 3


class ConfigurationError(OperatorError):
    """Settings or handlers that cannot work; carries every fault found, not the first."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class StoreUnsuitable(OperatorError):
    """A store answered, and what it said would break the promise (or it could not be asked at start)."""


class SchemaOutdated(OperatorError):
    """The database is not at the schema this build needs; the message names the command to run."""


class StripeRefused(OperatorError):
    """Stripe's API answered, and the answer is no: to the key, or to what was asked."""

    exit_code = 1


class StripeUnavailable(OperatorError):
    """Stripe's API is away, overloaded, or says what cannot be understood, also when asked again."""


# -- a store is away: the next delivery or the next round tries again ---------------------------------


class LedgerUnavailable(FirstclaimError):
    """Postgres could not do what was asked. Nothing is known to have been committed by the call."""


class StatementTimeout(LedgerUnavailable):
    """Postgres ended a question that took longer than whoever asks may take; nothing is wrong with it."""


class LockUnavailable(FirstclaimError):
    """Redis is away: refused, timed out, or answered with an error. The command may have been applied."""


# -- the handler's author must act --------------------------------------------------------------------


class HandlerRuleBroken(FirstclaimError):
    """A handler did what no handler may do (commit, return no action, ...); the message names the rule."""


class Retry(FirstclaimError):
    """Raised by a handler: try this event again, `after` seconds from now (default: the usual backoff).

    Nothing the handler did in its transaction is kept. The delivery is answered with 500.
    """

    def __init__(self, reason: str = "", *, after: float | None = None) -> None:
        if after is not None and not 0 <= after <= 3 * 86_400:
            raise ValueError(f"Retry(after={after!r}): expected 0 to 259200 seconds (3 days)")
        super().__init__(reason or "handler asked for a retry")
        self.after = after


class Permanent(FirstclaimError):
    """Raised by a handler: no retry will ever help. The event becomes `dead` and waits for an operator.

    Nothing the handler did in its transaction is kept. The delivery is answered with 200, so that Stripe
    neither retries it nor disables the endpoint.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "handler gave up for good")
