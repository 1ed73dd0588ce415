"""Which events this process wants, and the handler of each.

Guarantees: deliveries, recovery and reconcile decide it in the same way. Another build on the same ledger may decide
differently: see `firstclaim.inbox.claims`.
"""

from dataclasses import dataclass
from typing import Literal

from firstclaim.event import Event
from firstclaim.follow_up import is_follow_up
from firstclaim.handler_options import Options
from firstclaim.registry import Handler, Registry

Livemode = Literal["any", "live", "test"]


@dataclass(frozen=True, slots=True)
class Routes:
    """The handlers of this process, and the mode of the events that it takes."""

    registry: Registry
    livemode: Livemode

    def find(self, event: Event) -> Handler | str:
        """The event's handler, or the reason why this process does not want the event."""
        if not self._takes(event.livemode):
            mode = "live" if event.livemode else "test"
            return f"Event {event.id} is a {mode} mode event; this service takes {self.livemode} mode only"
        return self.registry.find(event.type) or f"Event type {event.type} not handled"

    def find_for(self, row_type: str, event: Event) -> Handler | str:
        """The handler of a row of the ledger, or the reason why this process does not want it.

        The row of a follow-up names its handler, and its event is that of another row, or a task.
        """
        if not is_follow_up(row_type):
            return self.find(event)
        if not self._takes(event.livemode):
            return f"it is of {'live' if event.livemode else 'test'} mode"
        return self.registry.find(row_type) or f"nothing here takes {row_type}"

    def handler_of(self, event_type: str, livemode: bool) -> Handler | None:
        """The handler of events of this type and mode; None if this process does not want them."""
        return self.registry.find(event_type) if self._takes(livemode) else None

    def wants(self, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode."""
        return self.handler_of(event_type, livemode) is not None

    def wants_for(self, handler: Handler, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode to `handler`."""
        return self.handler_of(event_type, livemode) is handler

    def wants_single(self, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode to a handler that takes one at a time.

        Without those whose handlers have limits.
        """
        handler = self.handler_of(event_type, livemode)
        return handler is not None and not handler.batch and not handler.options.limited

    def wants_unlimited(self, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode to a handler without limits of its own."""
        handler = self.handler_of(event_type, livemode)
        return handler is not None and not handler.options.limited

    def wants_limited(self, options: Options, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode to a handler with these very options."""
        handler = self.handler_of(event_type, livemode)
        return handler is not None and handler.options is options

    def _takes(self, livemode: bool) -> bool:
        return self.livemode == "any" or livemode is (self.livemode == "live")
