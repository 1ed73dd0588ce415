"""`invoice.payment_failed`: the shipped handler, and the pattern for one of your own.

Guarantees: table `payment_failures` has one row per invoice, that of its highest attempt, in whatever order and however
often the events arrive. The order is `attempt_count`: Stripe guarantees no order of delivery, and `created` has whole
seconds and ties. Of two events with the same attempt count (a payment retried by hand does not raise it) the first to
arrive is kept.

A payload that is not an invoice raises `Permanent`, which names the field and never its value: no retry can fix what
Stripe sent, and the reason is written to the ledger, where operators read it. Nothing sensitive is copied. Names and
e-mail addresses stay in the event, whose payload expires.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Integer, MetaData, Table, Text

from firstclaim import BatchContext, Event, Permanent, on

metadata = MetaData()

payment_failures = Table(
    "payment_failures",
    metadata,
    Column("invoice", Text(collation="C"), primary_key=True),
    Column("customer", Text),
    Column("subscription", Text),
    Column("amount_due_minor", BigInteger),
    Column("currency", Text),
    Column("attempt_count", Integer, nullable=False),
    Column("next_attempt_at", DateTime(timezone=True)),
    Column("failed_at", DateTime(timezone=True), nullable=False),
    Column("event_id", Text(collation="C"), nullable=False),
    CheckConstraint("invoice <> ''", name="payment_failures_invoice_check"),
    CheckConstraint("amount_due_minor >= 0", name="payment_failures_amount_due_minor_check"),
    CheckConstraint("currency <> ''", name="payment_failures_currency_check"),
    CheckConstraint("attempt_count >= 0", name="payment_failures_attempt_count_check"),
)

# Keep the row of the highest attempt. Two transactions may handle events of one invoice at once: the second insert
# waits for the first one's commit, and its WHERE then reads the committed row, so neither can undo the other. The rows
# come sorted by invoice: two transactions that wait for each other's rows, in opposite orders, would be a deadlock.
REMEMBER = """
INSERT INTO payment_failures AS known (invoice, customer, subscription, amount_due_minor, currency,
                                       attempt_count, next_attempt_at, failed_at, event_id)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[],
                     $6::int[], $7::timestamptz[], $8::timestamptz[], $9::text[])
ON CONFLICT (invoice) DO UPDATE
   SET (customer, subscription, amount_due_minor, currency, attempt_count, next_attempt_at, failed_at, event_id)
     = (excluded.customer, excluded.subscription, excluded.amount_due_minor, excluded.currency,
        excluded.attempt_count, excluded.next_attempt_at, excluded.failed_at, excluded.event_id)
 WHERE excluded.attempt_count > known.attempt_count
"""

_BIGINT_MOST = 2**63 - 1
_INTEGER_MOST = 2**31 - 1
_SECOND_MOST = 253_402_300_799  # the last second of the year 9999, which is datetime's maximum
_TEXT_MOST_CHARACTERS = 255


@on("invoice.payment_failed", batch=True)
async def record_payment_failures(events: list[Event], context: BatchContext) -> str:
    """Keep the newest failed attempt to collect each invoice."""
    rows = newest([payment_failure(event) for event in events])
    await context.fetch(REMEMBER, *(list(column) for column in zip(*(row.values() for row in rows), strict=True)))
    return "payment_failure_recorded"


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of each invoice's highest attempt, the first one of equal attempts, sorted by invoice.

    One statement must not update a row twice, so of two events of one invoice only one may be in it.
    """
    by_invoice: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = by_invoice.setdefault(row["invoice"], row)
        if row["attempt_count"] > known["attempt_count"]:
            by_invoice[row["invoice"]] = row
    return [by_invoice[invoice] for invoice in sorted(by_invoice)]


def payment_failure(event: Event) -> dict[str, Any]:
    """The row of `payment_failures` for `event`, in the order of its columns.

    Raises `Permanent` if the event holds no invoice. Fields: docs.stripe.com/api/invoices/object.
    """
    invoice = event.data.get("object")
    if not isinstance(invoice, dict) or invoice.get("object", "invoice") != "invoice":
        raise _no_invoice("data.object is another object")
    return {
        "invoice": _text(invoice.get("id"), "id"),
        "customer": _reference(invoice.get("customer"), "customer"),
        "subscription": _subscription(invoice),
        "amount_due_minor": _optional(_integer, invoice, "amount_due", _BIGINT_MOST),
        "currency": _optional(_text, invoice, "currency"),
        "attempt_count": _optional(_integer, invoice, "attempt_count", _INTEGER_MOST) or 0,
        "next_attempt_at": _optional(_instant, invoice, "next_payment_attempt"),
        "failed_at": event.created,
        "event_id": event.id,
    }


def _optional(check: Callable[..., Any], invoice: dict[str, Any], name: str, *limits: int) -> Any:
    """The validated field. A field that was not sent is null in the row: unknown, never invented."""
    value = invoice.get(name)
    return None if value is None else check(value, name, *limits)


def _subscription(invoice: dict[str, Any]) -> str | None:
    """From `parent`, since API version 2025-03-31, else from the field used before; null for a one-off invoice."""
    details = _object(_object(invoice, "parent"), "subscription_details", "parent.")
    if details.get("subscription") is not None:
        return _reference(details["subscription"], "parent.subscription_details.subscription")
    return _reference(invoice.get("subscription"), "subscription")


def _object(holder: dict[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    value = holder.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _no_invoice(f"{prefix}{name} must be an object or null")
    return value


def _reference(value: object, name: str) -> str | None:
    """The id of another object, which Stripe sends as the id, as the whole (expanded) object, or as null."""
    if value is None:
        return None
    if isinstance(value, dict):
        return _text(value.get("id"), f"{name}.id")
    return _text(value, name)


def _text(value: object, name: str) -> str:
    # A NUL is legal in JSON, but not in Postgres text. No id of Stripe's is longer than this, and an index has a limit.
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT_MOST_CHARACTERS or "\0" in value:
        raise _no_invoice(f"{name} must be a string of 1 to {_TEXT_MOST_CHARACTERS} characters, without NUL")
    return value


def _integer(value: object, name: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise _no_invoice(f"{name} must be an integer from 0 to {most}")
    return value


def _instant(value: object, name: str) -> datetime:
    return datetime.fromtimestamp(_integer(value, name, _SECOND_MOST), UTC)


def _no_invoice(problem: str) -> Permanent:
    return Permanent(f"not an invoice: {problem}")
