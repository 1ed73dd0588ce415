"""Forwards events over HTTP to the targets of a TOML file: `FIRSTCLAIM_HANDLERS=firstclaim.handlers.forward`.

Guarantees: an event is completed after a target has answered its POST with a 2xx, and not before. Until then it is
tried again, as an event of any handler that fails; a target that is down delays its events and loses none. A target
gets each event at least once, under the event's id (`webhook-id`): an answer may be lost, and then the event comes
again.

The request is made in the handler's transaction, although nothing is written there. The lock of the event's row is
what keeps every other process from forwarding it at the same time, however slow the target is; a process that dies
frees it at once. It costs a handler slot, a connection to Postgres and an open transaction for as long as the target
takes, so each target has a time limit, below the handler's deadline, and a limit of slots: what it cannot get at once
is not claimed.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from firstclaim import Context, Event, on
from firstclaim.handlers.forward.delivery import Forwarder
from firstclaim.handlers.forward.targets import Target, load_targets

if TYPE_CHECKING:
    from firstclaim import Settings


def declare_handlers(settings: "Settings") -> None:
    """Declare a handler for each target. Raises an `ExceptionGroup` with every fault of the file."""
    deadline = settings.handler_deadline_seconds
    targets = load_targets(settings.forward_targets, deadline_seconds=deadline)
    patterns = {pattern: None for target in targets for pattern in target.types}  # in the order of the file
    for target in targets:
        # Of several handlers for a type, those of the most specific pattern get it. So a target is declared for each
        # pattern of the file that its own patterns cover, and gets what it has asked for beside the others.
        wanted = [pattern for pattern in patterns if target.takes(pattern)]
        on(*wanted, name=f"forward:{target.name}", slots=_slots(target, settings))(_forwarding(Forwarder(target)))


def _slots(target: Target, settings: "Settings") -> int | None:
    """The target's share of the handler slots; None: all of them, which is no more than it asks for."""
    return target.concurrency if target.concurrency < settings.handler_slots else None


def _forwarding(forwarder: Forwarder) -> Callable[[Event[Any], Context], Awaitable[str]]:
    async def forward(event: Event[Any], context: Context) -> str:
        return await forwarder.forward(event.id, context.body)

    return forward
