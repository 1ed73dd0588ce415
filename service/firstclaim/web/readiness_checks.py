"""The health checks of `/readyz`: this process, Redis, Postgres, the schema, the recovery loop, the handlers."""

from firstclaim.inbox.lock import Lock
from firstclaim.inbox.recovery import Recovery
from firstclaim.inbox.slots import Slots
from firstclaim.migrations.schema import SchemaState, compare, outdated, read_version
from firstclaim.postgres.pool import Pool
from firstclaim.shutdown import Shutdown
from firstclaim.web.health import PROBE_SECONDS, Finding, Health, HealthCheck

_HUNG_NAMED = 5  # event ids in the detail


def readiness_checks(
    shutdown: Shutdown, lock: Lock, ingest: Pool, recovery: Recovery, slots: Slots
) -> list[HealthCheck]:
    """The checks, in the order of their lines. An unreachable Redis is `degraded`: events are still recorded."""

    async def process() -> Finding:
        return Finding(Health.DOWN, "draining") if shutdown.requested else Finding(Health.OK)

    async def redis() -> Finding:
        await lock.ping()
        return Finding(Health.OK)

    async def postgres() -> Finding:
        async with ingest.acquire(PROBE_SECONDS) as connection:
            await connection.fetchval("SELECT 1")
        return Finding(Health.OK)

    async def schema() -> Finding:
        async with ingest.acquire(PROBE_SECONDS) as connection:
            version = await read_version(connection)
        if compare(version) is SchemaState.OUTDATED:
            return Finding(Health.DOWN, str(outdated(version)))
        return Finding(Health.OK, f"at {version}")

    async def recovering() -> Finding:
        detail = f"last good round {recovery.idle_seconds:.1f} s ago"
        return Finding(Health.OK if recovery.healthy else Health.DOWN, detail)

    async def handlers() -> Finding:
        if not slots.hung:
            return Finding(Health.OK)
        events = ", ".join(list(slots.hung)[:_HUNG_NAMED])
        return Finding(
            Health.DEGRADED,
            f"{len(slots.hung)} of {slots.size} slots are held by threads past their deadline ({events}): restart",
        )

    return [
        HealthCheck("process", process),
        HealthCheck("redis", redis, failing=Health.DEGRADED),
        HealthCheck("postgres", postgres),
        HealthCheck("schema", schema),
        HealthCheck("recovery", recovering),
        HealthCheck("handlers", handlers),
    ]
