"""How Postgres runs the statements that find rows by their ids: by the ids, whatever it believes of the statuses."""

from collections.abc import Iterator

import pytest

from firstclaim.inbox import key_statement, statements
from firstclaim.operations import pauses
from firstclaim.postgres.statement import Statement
from tests.integration.world import World

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
    "abandoned": "0",
    "ignored": "false",
    "xid": "'7'",
}


def by_id() -> Iterator[tuple[str, Statement]]:
    """The statements that find rows of the ledger by their ids, and look at their status."""
    for module in (statements, key_statement, pauses):  # those of batches: see `batch_statements`
        for name, found in vars(module).items():
            if isinstance(found, Statement) and {"event_id", "event_ids"} & {*found.names} and "status" in found.sql:
                yield name, found


BY_ID = {name: found for name, found in by_id() if name != "INSERT"}


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_rows_are_found_by_their_ids(world: World, mode: str) -> None:
    """No statement reads an index of the rows of a status, which has every dead version that a snapshot keeps."""
    assert {"HOLD", "COMPLETE", "FAIL", "TAKE_OVER", "HOLD_FOR_KEY", "READY"} <= BY_ID.keys()
    await world.database.execute(f"{ROWS}; ANALYZE firstclaim.stripe_events; SET plan_cache_mode = {mode}")
    for name, found in BY_ID.items():
        values = ", ".join(VALUES.get(each, "NULL") for each in found.names)
        await world.database.execute(f"PREPARE by_id AS {found.sql}")
        plan = "\n".join(row[0] for row in await world.database.fetch(f"EXPLAIN EXECUTE by_id({values})"))
        await world.database.execute("DEALLOCATE by_id")
        assert "stripe_events_pkey" in plan, (name, plan)
        assert "stripe_events_" not in plan.replace("stripe_events_pkey", ""), (name, plan)
