"""firstclaim: receives Stripe webhooks and dispatches each event once.

What a handler module needs, and nothing that opens anything:

    from firstclaim import Context, Event, on

    @on("invoice.payment_failed")
    async def remember(event: Event, context: Context) -> str: ...

`asgi` and `Settings` are for an application that embeds the service. They are imported when they are first used.
"""

from typing import TYPE_CHECKING

from firstclaim.context import BatchContext, Context, TaskContext
from firstclaim.declare import on
from firstclaim.errors import Pause, Permanent, Retry
from firstclaim.event import Event
from firstclaim.tasks import task

if TYPE_CHECKING:
    from firstclaim.mounted import asgi
    from firstclaim.settings import Settings

__all__ = [
    "BatchContext",
    "Context",
    "Event",
    "Pause",
    "Permanent",
    "Retry",
    "Settings",
    "TaskContext",
    "asgi",
    "on",
    "task",
]

_ON_FIRST_USE = {"Settings": "firstclaim.settings", "asgi": "firstclaim.mounted"}


def __getattr__(name: str) -> object:
    """The names that cost more to import than a handler module should pay."""
    if (module := _ON_FIRST_USE.get(name)) is None:
        raise AttributeError(f"module 'firstclaim' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
