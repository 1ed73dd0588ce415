"""`python -m tests.load.ledger_size`: fresh events into an empty ledger, and into one with millions of rows.

Two services of the same build on two databases of the same server, in alternating rounds; only the one that is
being measured has any load. The rows have random ids, and bodies of a few bytes: what is asked is whether the
ledger's indexes and statements mind, not how fast a disk reads bodies that nobody looks at.
"""

import argparse

from rich.console import Console

from tests.acceptance.harness import Sandbox, Service
from tests.fixtures import SECRET
from tests.load.bench import execute, on_servers
from tests.load.driver import Driver, Ids, Kind, side_by_side

_BATCH = 500_000

_FILL = """
INSERT INTO firstclaim.stripe_events (event_id, type, livemode, created_at, status, attempt, action,
                           received_at, due_at, give_up_at, settled_at)
SELECT 'evt_1' || left(md5(n::text), 24), 'invoice.paid', false, at, 'completed', 1, 'load_effect_recorded',
       at, at, at + interval '3 days', at
  FROM generate_series({first}, {last}) AS n, LATERAL (SELECT now() - n * interval '1 second' AS at) AS received;
INSERT INTO firstclaim.stripe_event_payloads (event_id, body)
SELECT 'evt_1' || left(md5(n::text), 24), '{{}}' FROM generate_series({first}, {last}) AS n;
INSERT INTO load_effects (event_id, attempt, xid, recorded_at)
SELECT 'evt_1' || left(md5(n::text), 24), 1, '1', now() FROM generate_series({first}, {last}) AS n
"""


async def fill(sandbox: Sandbox, rows: int) -> None:
    """Put so many completed events into the ledger, as if they had come at one a second."""
    for first in range(1, rows + 1, _BATCH):
        await execute(sandbox, _FILL.format(first=first, last=min(first + _BATCH - 1, rows)))
    for table in ("firstclaim.stripe_events", "firstclaim.stripe_event_payloads"):
        await execute(sandbox, f"VACUUM (ANALYZE) {table}")


def main() -> None:
    """Print every round, and the median ratios."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.ledger_size", description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--ids", type=Ids, choices=[*Ids], default=Ids.RANDOM, help="of the events that are sent")
    asked = parser.parse_args()

    async def measure(services: list[tuple[Sandbox, Service]]) -> None:
        (full, on_full), (_, on_empty) = services
        await fill(full, asked.rows)
        sides = {
            name: Driver(service.url, SECRET, asked.seconds, ids=asked.ids)
            for name, service in ((f"{asked.rows:,} rows", on_full), ("empty", on_empty))
        }
        Console().print(side_by_side(sides, [Kind.FRESH], asked.rounds))

    on_servers(2, measure)


if __name__ == "__main__":
    main()
