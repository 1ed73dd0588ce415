"""The deliveries of an event, as far as the ledger keeps them: headers of the first one, and the number of the others.

Guarantees: nothing here changes a row or waits for a lock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from firstclaim.postgres.statement import statement

DELIVERIES = statement("""
SELECT p.headers, coalesce(d.duplicates, 0) AS duplicates, d.last_at AS last_duplicate_at
  FROM (SELECT CAST(:event_id AS text) COLLATE "C" AS event_id) AS e
  LEFT JOIN firstclaim.stripe_event_payloads p USING (event_id)
  LEFT JOIN firstclaim.stripe_event_duplicates d USING (event_id)
""")


@dataclass(frozen=True, slots=True)
class Deliveries:
    """The deliveries of an event: what is kept of the first one, and those after it.

    `headers`: some of those of the delivery that recorded the event, `name: value` each; None if they are not kept.
    `duplicates`: the deliveries after it, as far as they were counted (`firstclaim.inbox.duplicates`).
    """

    headers: list[str] | None
    duplicates: int
    last_duplicate_at: datetime | None


def deliveries_of(row: Mapping[str, Any]) -> Deliveries:
    """The deliveries in a row of `DELIVERIES`."""
    headers = None if row["headers"] is None else row["headers"].split("\n")
    return Deliveries(headers, row["duplicates"], row["last_duplicate_at"])
