"""Events as Stripe sends them, for all tests, built from the shipped templates on each call.

Guarantees: each call returns a new event id unless the caller gives one, so tests can share a database. A test's
changes are merged into the template: a dict is merged into the dict of that name, any other value replaces the old one,
and `MISSING` removes the field.
"""

from typing import Any, Final

import orjson

from firstclaim.sending.client import sign
from firstclaim.sending.events import build_event

SECRET: Final = "whsec_test"
MISSING: Final = object()


def event_body(type: str = "invoice.payment_failed", id: str | None = None, **overrides: Any) -> bytes:  # noqa: A002
    """The body of one event, for example `event_body(livemode=True, data={"object": {"attempt_count": 3}})`."""
    return orjson.dumps(_merged(orjson.loads(build_event(type, id)), overrides))


def signed(body: bytes, secret: str = SECRET, at: int | None = None) -> dict[str, str]:
    """The headers that Stripe sends with `body`, signed at the time `at` (unix seconds, default: now)."""
    return {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": sign(body, secret, at)}


def old_shape_payment_failed(id: str | None = None, **overrides: Any) -> bytes:  # noqa: A002
    """`invoice.payment_failed` of API version 2024-06-20: no `parent`, but `subscription` on top."""
    event = orjson.loads(build_event("invoice.payment_failed", id)) | {"api_version": "2024-06-20"}
    invoice = event["data"]["object"]
    details = invoice.pop("parent")["subscription_details"]
    invoice["lines"]["data"] = [_old_shape_line(line) for line in invoice["lines"]["data"]]
    for name in ("amount_overpaid", "amount_paid_off_stripe", "customer_account"):
        del invoice[name]
    invoice |= {
        "application_fee_amount": None,
        "charge": "ch_3Pq1xXKdVq2Wn7RtLx0aB1cD",
        "discount": None,
        "paid": False,
        "paid_out_of_band": False,
        "payment_intent": "pi_3Pq1xXKdVq2Wn7RtLx4eF5gH",
        "quote": None,
        "subscription": details["subscription"],
        "subscription_details": {"metadata": {}},
        "tax": None,
        "total_tax_amounts": invoice.pop("total_taxes"),
        "transfer_data": None,
    }
    return orjson.dumps(_merged(event, overrides))


def _old_shape_line(line: dict[str, Any]) -> dict[str, Any]:
    item = line["parent"]["subscription_item_details"]
    kept = {name: value for name, value in line.items() if name not in ("parent", "pricing", "subtotal", "taxes")}
    return kept | {
        "proration": False,
        "subscription": item["subscription"],
        "subscription_item": item["subscription_item"],
        "tax_amounts": [],
        "type": "subscription",
        "unit_amount_excluding_tax": line["pricing"]["unit_amount_decimal"],
    }


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, change in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return {name: value for name, value in merged.items() if value is not MISSING}
