"""Limits of the operators' commands, in a module of their own: the help of the command line imports no driver."""

ROW_DAYS_LEAST = 35  # Stripe can resend an event for 30 days: until then only the row detects the duplicate
LISTED_DAYS_MOST = 30  # how long Stripe lists an event
PRUNE_BUSY_PERCENT = 10  # of the time: measured by `python -m tests.load.large_ledger`, see docs/explanation/scaling.md
TEXT_MOST_CHARACTERS = 255  # of an id, a type or an account


def is_storable(text: str) -> bool:
    """Whether an id, a type or an account in the ledger can be this text."""
    return text.isprintable() and 0 < len(text) <= TEXT_MOST_CHARACTERS
