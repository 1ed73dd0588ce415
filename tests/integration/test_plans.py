"""How Postgres runs the statements that find rows by their ids: by the ids, whatever it believes of the statuses."""

from collections.abc import Iterator, Mapping

import asyncpg
import pytest

from firstclaim.inbox import batch_statements, key_statement, statements
from firstclaim.operations import pauses
from firstclaim.postgres.statement import Statement
from tests.integration.world import World
from tests.stores import Stores, clone, drop

# A row of each status, and thousands that are settled: an index of the rows of one status has a single row then.
ROWS = """
INSERT INTO firstclaim.stripe_events
       (event_id, type, livemode, created_at, status, attempt, due_at, received_at, give_up_at, settled_at)
SELECT 'evt_' || number, 'invoice.paid', true, now(), status, 1, now(), now(), now(),
       CASE WHEN status IN ('completed', 'ignored', 'dead') THEN now() END
  FROM generate_series(1, 5000) AS number,
       LATERAL (SELECT (ARRAY['pending', 'processing', 'failed', 'dead', 'ignored'])[number] AS rare) AS of_few,
       LATERAL (SELECT coalesce(rare, 'completed') AS status) AS of_all
"""
VALUES = {
    "event_id": "'evt_7'",
    "event_ids": "ARRAY['evt_7']",
    "attempt": "1",
    "attempts": "ARRAY[1]",
    "abandoned": "0",
    "actions": "ARRAY['done']",
    "number": "1",
    "ignored": "false",
    "xid": "'7'",
}


def by_id() -> Iterator[tuple[str, Statement]]:
    """The statements that find rows of the ledger by their ids, and look at their status."""
    for module in (statements, batch_statements, key_statement, pauses):
        for name, found in vars(module).items():
            if isinstance(found, Statement) and {"event_id", "event_ids"} & {*found.names} and "status" in found.sql:
                yield name, found


BY_ID = {name: found for name, found in by_id() if name != "INSERT"}


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_rows_are_found_by_their_ids(world: World, mode: str) -> None:
    """No statement reads an index of the rows of a status, which has every dead version that a snapshot keeps."""
    assert {"HOLD", "COMPLETE", "FAIL", "TAKE_OVER", "HOLD_ALL", "COMPLETE_ALL", "HOLD_FOR_KEY"} <= BY_ID.keys()
    await world.database.execute(f"{ROWS}; ANALYZE firstclaim.stripe_events; SET plan_cache_mode = {mode}")
    await assert_found_by_id(world.database, BY_ID)


async def test_a_new_ledger_is_not_read_whole(stores: Stores) -> None:
    """A plan that was made when the ledger was empty, and that is kept until it is analysed, looks up each row too.

    Those with a mere list of ids are of recovery and of duplicates, which a new ledger has none of.
    """
    of_each_event = {name: found for name, found in BY_ID.items() if "event_id = ANY" not in found.sql}
    assert {"HOLD", "COMPLETE", "FAIL", "HOLD_ALL", "COMPLETE_ALL", "RENEW", "POSTPONE"} <= of_each_event.keys()
    url = await clone(stores)
    try:
        database = await asyncpg.connect(url)
        await database.execute("SET plan_cache_mode = force_generic_plan")
        await assert_found_by_id(database, of_each_event)
        await database.close()
    finally:
        await drop(url)


async def assert_found_by_id(database: asyncpg.Connection, all_found: Mapping[str, Statement]) -> None:
    for name, found in all_found.items():
        values = ", ".join(VALUES.get(each, "NULL") for each in found.names)
        await database.execute(f"PREPARE by_id AS {found.sql}")
        plan = "\n".join(row[0] for row in await database.fetch(f"EXPLAIN EXECUTE by_id({values})"))
        await database.execute("DEALLOCATE by_id")
        assert "stripe_events_pkey" in plan, (name, plan)
        assert "stripe_events_" not in plan.replace("stripe_events_pkey", ""), (name, plan)
