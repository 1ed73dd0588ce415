"""All exceptions that this service raises, grouped by who must act on them.

Expected results (a duplicate, a failed handler, an unreachable Redis) are values and not exceptions: see
`firstclaim.outcome.Outcome`. An exception means that somebody must act.
"""

from collections.abc import Sequence
from typing import Literal

from firstclaim.formatting import shown


class FirstclaimError(Exception):
    """The base class. Catch it at a boundary (an endpoint, a command), not inside."""


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
    """A request that is refused before Redis or Postgres is contacted.

    `status` is the HTTP status, `reason` the generic sentence in the answer, and `kind` a label from a closed set, for
    logs and metrics. None of them holds any byte of the request, so they are safe to log.
    """

    def __init__(self, kind: RejectedKind, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.status = status


# -- the operator must act ----------------------------------------------------------------------------


class OperatorError(FirstclaimError):
    """Shown on the terminal as one sentence, not as a traceback. `exit_code` is the exit code of the command."""

    exit_code = 3


class ConfigurationError(OperatorError):
    """Settings or handlers are invalid. Holds all faults, not only the first."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class StoreUnsuitable(OperatorError):
    """A store's version or configuration would break the promise, or a store is unreachable at the start."""


class SchemaOutdated(OperatorError):
    """The database lacks the schema that this build needs. The message names the command to run."""


class StripeRefused(OperatorError):
    """Stripe's API refused the key or the request."""

    exit_code = 1


class StripeUnavailable(OperatorError):
    """Stripe's API is unreachable, overloaded, or sends invalid answers, and retries did not help."""


class ArchiveUnavailable(OperatorError):
    """The storage of the archive refused a file, or could not be reached. The message says what to change."""


# -- a store is unreachable: the next delivery or the next recovery round tries again -----------------


class LedgerUnavailable(FirstclaimError):
    """Postgres could not execute the call. It is unknown whether anything was committed."""


class LedgerRefused(LedgerUnavailable):
    """Postgres cannot be used as it is configured, and no other attempt helps: login, database, TLS, a parameter.

    The message says what to change, without any part of the address. `detail` is what the server or the certificate
    says, which names the user, the database or the host: for the operator's terminal. While the service runs it is
    treated as any `LedgerUnavailable`, because the server's configuration may be what changed. `exit_code` is 2 if
    `DATABASE_URL` is at fault by itself.
    """

    def __init__(self, reason: str, *, detail: str = "", exit_code: int = OperatorError.exit_code) -> None:
        super().__init__(reason)
        self.detail = detail
        self.exit_code = exit_code

    @property
    def explained(self) -> str:
        """The detail, with the message."""
        return f"{self.detail} ({self})" if self.detail else str(self)


class StatementTimeout(LedgerUnavailable):
    """Postgres ended a query at its statement timeout. Postgres itself is healthy."""


class LockUnavailable(FirstclaimError):
    """Redis refused the connection, timed out, or answered with an error. It may have executed the command."""


# -- the handler's author must act --------------------------------------------------------------------


class HandlerRuleBroken(FirstclaimError):
    """A handler broke a rule (it committed, returned no valid action, ...). The message names the rule."""


class Retry(FirstclaimError):
    """Raised by a handler to retry this event, `after` seconds from now (default: the usual backoff).

    The handler's transaction is rolled back. The delivery is answered with 500.
    """

    def __init__(self, reason: str = "", *, after: float | None = None) -> None:
        if after is not None and not (isinstance(after, int | float) and 0 <= after <= 3 * 86_400):
            raise ValueError(f"Retry(after={shown(after)}): expected 0 to 259200 seconds (3 days)")
        super().__init__(reason or "handler asked for a retry")
        self.after = after


class Pause(FirstclaimError):
    """Raised by a handler if no event of this type can succeed before an operator has acted: it pauses the type.

    The handler's transaction is rolled back. The event waits, as all of its type do from then on, without a failure,
    until `firstclaim resume TYPE`. The delivery is answered with 202.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "handler asked for a pause of the event's type")


class Permanent(FirstclaimError):
    """Raised by a handler if no retry can help. The event becomes `dead` and waits for an operator.

    The handler's transaction is rolled back. The delivery is answered with 200, so that Stripe neither retries it nor
    disables the endpoint.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "handler gave up for good")
