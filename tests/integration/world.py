"""The service's components as `firstclaim.components` puts them together, on real stores, in the test's own event loop.

Guarantees: nothing listens and no recovery loop runs, so that a test alone decides what happens when; what the
components opened is closed at the end; what a test sees of the ledger it reads on a connection of its own.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar, cast

import asyncpg
from pydantic import SecretStr
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from firstclaim import BatchContext, Context, Event
from firstclaim.components import Components, assemble
from firstclaim.event import Delivery, parse_event
from firstclaim.handler_options import HandlerOptions, checked
from firstclaim.inbox.claim import Claim
from firstclaim.inbox.claims import Claims
from firstclaim.inbox.dispatch import Dispatcher
from firstclaim.inbox.ledger import Ledger
from firstclaim.inbox.lock import Lock
from firstclaim.inbox.pipeline import Pipeline
from firstclaim.inbox.redis_server import RedisServer
from firstclaim.inbox.slots import Place, Slots
from firstclaim.outcome import Outcome
from firstclaim.postgres.connection import PinnedConnection
from firstclaim.postgres.handler_connections import HandlerConnection
from firstclaim.postgres.statement import Statement, statement
from firstclaim.registry import Handler, Registry
from firstclaim.settings import Settings
from firstclaim.status import Status
from tests.fixtures import SECRET, event_body

Function = Callable[[Event, Context], Any]
BatchFunction = Callable[[list[Event], BatchContext], Any]
T = TypeVar("T")


def every_event(_type: str, _livemode: bool) -> bool:
    """A process that wants all events."""
    return True


# Long enough that no test meets one by accident; a test that is about one of them sets it.
CALM = {
    "lease_seconds": 60.0,
    "handler_deadline_seconds": 120.0,
    "idle_in_transaction_seconds": 180.0,
    "answer_budget_seconds": 60.0,
    "postgres_timeout_seconds": 10.0,
    "redis_timeout_seconds": 5.0,
    "handler_slots": 4,
    "ingest_connections": 4,
}

NOTHING = statement("SELECT WHERE false")  # as the first or last statement of a transaction

EFFECT = text(
    "INSERT INTO effects (event_id, attempt, pid, xid)"
    " VALUES (:event_id, :attempt, pg_backend_pid(), pg_current_xact_id()::text)"
)


async def effect(event: Event, context: Context, connection: AsyncConnection | None = None) -> None:
    """What a handler does to the database: one row of `effects`."""
    await (connection or context.connection).execute(EFFECT, {"event_id": event.id, "attempt": context.attempt})


async def effects(events: list[Event], context: BatchContext) -> None:
    """The same of a batch handler: one row for each event."""
    await context.connection.execute(
        EFFECT, [{"event_id": event.id, "attempt": context.attempts[event.id]} for event in events]
    )


def effect_from_thread(event: Event, context: Context) -> None:
    """The same from a sync handler."""
    context.execute(EFFECT, {"event_id": event.id, "attempt": context.attempt})


def delivery(event_id: str | None = None, type: str = "invoice.payment_failed", **changes: Any) -> Delivery:  # noqa: A002
    """One delivery of a fresh event."""
    body = event_body(type, event_id, **changes)
    return Delivery(parse_event(body), body)


@dataclass(frozen=True, slots=True)
class World:
    """The components of one process, and a connection of the test's own to their database."""

    settings: Settings
    components: Components
    database: asyncpg.Connection

    @property
    def lock(self) -> Lock:
        return self.components.lock

    @property
    def pipeline(self) -> Pipeline:
        return self.components.pipeline

    @property
    def claims(self) -> Claims:
        return self.pipeline._claims

    @property
    def ledger(self) -> Ledger:
        return self.claims._ledger

    @property
    def dispatcher(self) -> Dispatcher:
        return self.pipeline._dispatcher

    @property
    def slots(self) -> Slots:
        return self.pipeline._slots

    async def claim(self, given: Delivery | None = None) -> Claim:
        """A claimed row."""
        won = await self.ledger.claim(given or delivery())
        assert isinstance(won, Claim)
        return won

    async def marked(self) -> Claim:
        """A claimed row with its marker in Redis, as a delivery leaves them when it begins to dispatch."""
        given = delivery()
        won = await self.claims.claim(given, await self.claims.lock(given.event.id), unwanted=None)
        assert isinstance(won, Claim)
        assert await self.value(won.event_id) == f"recorded:{won.epoch}".encode()
        return won

    async def dispatch(self, function: Function, claim: Claim) -> Outcome:
        """What came of dispatching a claim to `function`."""
        assert claim.body is not None
        place = Place(self.slots, for_delivery=True)
        return await self.dispatcher.run(claim, parse_event(claim.body), Handler("*", function), place)

    async def row(self, event_id: str) -> dict[str, Any]:
        """The ledger's row; `due_in` and `give_up_in` are in seconds by the database's clock."""
        found = await self.database.fetchrow(
            """
            SELECT *, extract(epoch FROM due_at - clock_timestamp())::float AS due_in,
                   extract(epoch FROM give_up_at - clock_timestamp())::float AS give_up_in
              FROM firstclaim.stripe_events WHERE event_id = $1
            """,
            event_id,
        )
        assert found is not None, f"no row for {event_id}"
        return dict(found)

    async def status(self, event_id: str) -> Status:
        """The row's status."""
        return Status((await self.row(event_id))["status"])

    @property
    def redis_server(self) -> RedisServer:
        """Where the lock's keys are."""
        assert isinstance(self.lock._servers, RedisServer)
        return self.lock._servers

    @property
    def redis(self) -> Redis:
        """A client of the same server."""
        return self.redis_server.client

    async def value(self, event_id: str) -> bytes | None:
        """What Redis holds for the event."""
        return cast(bytes | None, await self.redis.get(self.lock._key(event_id)))

    async def effects(self, event_id: str) -> int:
        """How many effects of the event are committed."""
        found: int = await self.database.fetchval("SELECT count(*) FROM effects WHERE event_id = $1", event_id)
        return found

    async def change(self, event_id: str, **columns: Any) -> None:
        """Put the row into another state; an interval in seconds for `..._at` counts from now."""
        for name, value in columns.items():
            expression = "clock_timestamp() + make_interval(secs => $2)" if name.endswith("_at") else "$2"
            await self.database.execute(
                f"UPDATE firstclaim.stripe_events SET {name} = {expression} WHERE event_id = $1", event_id, value
            )

    async def age(self, event_id: str, days: float) -> None:
        """As if the event had been received, and settled, so many days ago."""
        await self.change(event_id, received_at=-days * 86_400.0, settled_at=-days * 86_400.0)
        await self.database.execute(
            "UPDATE firstclaim.stripe_event_payloads SET received_at = clock_timestamp() - make_interval(secs => $2)"
            " WHERE event_id = $1",
            event_id,
            days * 86_400.0,
        )

    async def settle(self, event_id: str, status: Status) -> None:
        """Put the row into a status, settled or not as that has it."""
        settled = status in (Status.COMPLETED, Status.IGNORED, Status.DEAD)
        await self.database.execute(
            """
            UPDATE firstclaim.stripe_events SET status = $2, settled_at = CASE WHEN $3 THEN clock_timestamp() END
             WHERE event_id = $1
            """,
            event_id,
            status,
            settled,
        )

    async def state_of(self, given: Delivery, status: Status) -> Delivery:
        """Record the event and put its row into `status`."""
        await self.ledger.record(given, due_in_seconds=0)
        await self.settle(given.event.id, status)
        return given

    @asynccontextmanager
    async def locked(self, *event_ids: str) -> AsyncIterator[None]:
        """Another transaction holds the row while the block runs."""
        other = await asyncpg.connect(self.url)
        try:
            await other.execute("BEGIN")
            await other.execute("SELECT FROM firstclaim.stripe_events WHERE event_id = ANY($1) FOR UPDATE", event_ids)
            yield
        finally:
            await other.close()

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[HandlerConnection]:
        """A connection as a handler has it."""
        seat = await self.components.handler_connections.acquire()
        try:
            yield seat
        finally:
            await seat.roll_back()
            await self.components.handler_connections.release(seat)

    @property
    def url(self) -> str:
        """Where the ledger is."""
        assert self.settings.database_url is not None
        return self.settings.database_url.get_secret_value()

    async def close(self) -> None:
        """Everything that was opened."""
        await self.pipeline.drain(5)
        if self.components.stripe_objects is not None:
            await self.components.stripe_objects.close()
        await self.lock.close()
        await self.components.handler_connections.close()
        await self.components.ingest.close()
        await self.components.metrics_pool.close()
        await self.components.admin.close()
        await self.components.probe.close()
        with suppress(OSError):  # a test may have ended it, unnoticed so far
            await self.database.close()


async def explained(connection: PinnedConnection, statement: Statement, how: str = "EXPLAIN", **parameters: Any) -> str:
    """How the server would run a statement of the ledger's."""
    explain = replace(statement, sql=f"{how} {statement.sql}")
    return "\n".join(row[0] for row in await explain.fetch(connection, **parameters))


async def build(
    database_url: str,
    redis_url: str,
    prefix: str,
    handlers: dict[str, Function] | None = None,
    batch_handlers: dict[str, BatchFunction] | None = None,
    declared: Sequence[Handler] = (),
    options: Mapping[str, HandlerOptions] = MappingProxyType({}),
    **changes: Any,
) -> World:
    """The components on these stores, with handlers and their options by pattern, or declared.

    `changes` are settings, also out of range.
    """
    settings = Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        stripe_webhook_secrets=(SecretStr(SECRET),),
    ).model_copy(update={**CALM, "redis_prefix": prefix, **changes})
    registry = Registry(
        [
            *(
                Handler(pattern, function, options=checked(options.get(pattern, {}), batch=False))
                for pattern, function in (handlers or {}).items()
            ),
            *(Handler(pattern, function, batch=True) for pattern, function in (batch_handlers or {}).items()),
            *declared,
        ]
    )
    return World(settings, assemble(settings, registry), await asyncpg.connect(database_url))


async def due(world: World, count: int, *, abandoned: bool = False) -> list[str]:
    """Ids of due events, oldest first, as a process that wants all types reads them."""
    queues = await world.ledger.queues(abandoned=abandoned)
    events = await world.ledger.due(dict.fromkeys(queues), count, abandoned=abandoned)
    return [event.event_id for event in events]


async def until(look: Callable[[], Awaitable[T]], seconds: float = 20) -> T:
    """Look again and again until there is something to see; returns it. Fails with what was seen last.

    The longer it has waited, the rarer it looks: most looks are a query, whose server needs the same cores.
    """
    began = time.monotonic()
    while not (seen := await look()):
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds:g} s; seen last: {seen!r}"
        await asyncio.sleep(min(0.001 + waited / 10, 0.05))
    return seen


async def until_closed(*connections: asyncpg.Connection) -> None:
    """Wait until the driver has noticed their end: between a server's last word and the socket's end it cannot tell."""

    async def noticed() -> bool:
        return all(each.is_closed() for each in connections)

    await until(noticed)
