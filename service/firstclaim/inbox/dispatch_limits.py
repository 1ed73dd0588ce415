"""The times of an attempt: those of the settings, or those that a handler is declared with."""

from dataclasses import dataclass

from firstclaim.registry import Handler


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Seconds; `firstclaim.settings` says why each has its default."""

    deadline_seconds: float
    lease_seconds: float
    postgres_timeout_seconds: float
    fetch_seconds: float
    idle_in_transaction_seconds: float

    def deadline_of(self, handler: Handler) -> float:
        """The deadline of this handler."""
        own = handler.options.deadline_seconds
        return self.deadline_seconds if own is None else own

    def idle_of(self, handler: Handler) -> float:
        """When Postgres ends a transaction of this handler that is idle."""
        return handler.options.idle_seconds(self.deadline_seconds, self.idle_in_transaction_seconds)
