"""Which events this process wants, and the handler of each.

Guarantees: deliveries, recovery and reconcile decide it in the same way. Another build on the same ledger may decide
differently: see `firstclaim.inbox.claims`.
"""

from dataclasses import dataclass
from typing import Literal

from firstclaim.event import Event
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

    def wants(self, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode."""
        return self._takes(livemode) and self.registry.find(event_type) is not None

    def wants_for(self, handler: Handler, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode to `handler`."""
        return self._takes(livemode) and self.registry.find(event_type) is handler

    def wants_single(self, event_type: str, livemode: bool) -> bool:
        """Whether this process dispatches events of this type and mode to a handler that takes one at a time."""
        handler = self.registry.find(event_type)
        return self._takes(livemode) and handler is not None and not handler.batch

    def _takes(self, livemode: bool) -> bool:
        return self.livemode == "any" or livemode is (self.livemode == "live")
