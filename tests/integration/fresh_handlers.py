"""A module of handlers that `FIRSTCLAIM_HANDLERS` can name: one with `fresh=True`."""

from firstclaim import Context, Event, on


@on("invoice.paid", fresh=True)
async def look(_event: Event, _context: Context) -> str:
    """Does nothing."""
    return "looked"
