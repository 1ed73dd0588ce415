"""What a process holds of an event: its claim, and the transaction of its handler."""

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Claim:
    """A ledger row that is ours to dispatch. `attempt` fences it, `epoch` goes into its marker.

    `erred`: an earlier attempt has left an error in the row, so it enters only batches of such events. `alone`: it is
    that of a batch, so it enters none. `traceparent`: of the span that recorded the row. `token`: of its lock, until
    its marker is written. `endpoint`: the name of the endpoint that first received the event.
    """

    event_id: str
    type: str
    attempt: int
    failures: int
    abandoned: int
    body: bytes | None = field(repr=False)
    epoch: str | None
    erred: bool = False
    alone: bool = False
    traceparent: str | None = None
    endpoint: str | None = None
    token: str = ""


@dataclass(frozen=True, slots=True, eq=False)  # by identity: the watch looks it up for each event
class HandlerTransaction:
    """A handler's transaction: its id, its backend, when the server was started, and when the transaction began.

    `has_key`: false if its event has a key, and another transaction has the lock of that key.
    """

    xid: str
    pid: int
    server_started_at: datetime
    began_at: datetime
    has_key: bool = True
