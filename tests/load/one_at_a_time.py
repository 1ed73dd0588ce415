"""The ordinary twin of the shipped handler: one event at a time, and the same upsert.

To compare what a batch handler saves: serve with `FIRSTCLAIM_HANDLERS=tests.load.one_at_a_time`. The table is the
shipped handler's, so migrate with `FIRSTCLAIM_HANDLERS=firstclaim.handlers` before.
"""

from firstclaim import Context, Event, on
from firstclaim.handlers.invoices import REMEMBER, payment_failure

# The same statement, for one row.
_ARRAYS = REMEMBER[REMEMBER.index("SELECT * FROM unnest") : REMEMBER.index("ON CONFLICT")]
REMEMBER_ONE = REMEMBER.replace(_ARRAYS, "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)\n")


@on("invoice.payment_failed")
async def record_payment_failure(event: Event, context: Context) -> str:
    """Keep the newest failed attempt to collect an invoice."""
    await context.fetch(REMEMBER_ONE, *payment_failure(event).values())
    return "payment_failure_recorded"
