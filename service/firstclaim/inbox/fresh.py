"""The newest state of an event's object, fetched before the transaction of a handler with `fresh=True` begins.

Guarantees: while the network is waited for, no row is locked and no connection is taken. What protects the claim
meanwhile is its lease. A claim waits for a slot for half of its lease at most, and a fetch takes a quarter of it at
most (`faults` in `firstclaim.operations.stripe_objects` sees to that), so the last quarter is left to lock the row. If
a process is so slow that the lease ends all the same, the row is not ours any more, and the first statement of the
transaction finds that out: then no handler is called.

The marker in Redis is written before, so the lock's TTL does not limit the fetch. The time that the fetch took counts
against the handler's deadline. No handler has been called, so a fetch that is interrupted by a shutdown is released
without a charge; one that fails is a failure of the attempt; one that Stripe asks to repeat later is due then.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from firstclaim.errors import Retry, StripeUnavailable
from firstclaim.event import Event
from firstclaim.inbox.attempt import Failed, Postponed

# The object of an event as it is now. Raises `Retry` for a request that Stripe asks to repeat later, `Permanent` for an
# object that cannot be fetched, and any other error for a failure.
FetchObject = Callable[[Event], Awaitable[dict[str, Any]]]


async def with_fresh_object(fetch: FetchObject, event: Event, timeout_seconds: float) -> Event | Failed | Postponed:
    """The event with its object as it is now, or the end of the attempt. Raises nothing but a cancellation."""
    error: Exception
    try:
        async with asyncio.timeout(timeout_seconds):
            return event.with_object(await fetch(event))
    except Retry as retry:
        return Postponed(retry)
    except TimeoutError:
        error = StripeUnavailable(f"Stripe's API did not answer within {timeout_seconds:g} s")
    except Exception as failure:  # noqa: BLE001  (of a client library: whatever it raises, the event must be settled)
        error = failure
    return Failed(error, effects_committed=False, running=None, hung=False)
