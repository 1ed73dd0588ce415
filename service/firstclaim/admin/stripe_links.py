"""Links from an event to Stripe's dashboard: of the right account, and of live or test mode.

Guarantees: an address is built from the ledger's own columns, quoted, and always below `DASHBOARD`. An object of a kind
without a page of its own leads to the dashboard's search.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from firstclaim.operations.queries import EventRow

DASHBOARD: Final = "https://dashboard.stripe.com"
# The part of the address for ids that begin so.
_PAGES: Final[Mapping[str, str]] = {
    "cus_": "customers",
    "in_": "invoices",
    "sub_": "subscriptions",
    "pi_": "payments",
    "ch_": "payments",
    "py_": "payments",
    "prod_": "products",
    "price_": "prices",
    "po_": "payouts",
    "plink_": "payment-links",
    "du_": "disputes",
    "acct_": "connect/accounts",
}


def to_event(event: EventRow) -> str:
    """The event's page."""
    return f"{_base(event)}/events/{quote(event.event_id, safe='')}"


def to_object(event: EventRow) -> str | None:
    """The page of the event's object, or None if the ledger does not know the object."""
    if event.object_id is None:
        return None
    identifier = quote(event.object_id, safe="")
    page = next((page for prefix, page in _PAGES.items() if event.object_id.startswith(prefix)), None)
    return f"{_base(event)}/search?query={identifier}" if page is None else f"{_base(event)}/{page}/{identifier}"


def _base(event: EventRow) -> str:
    account = "" if event.account is None else f"/{quote(event.account, safe='')}"
    return f"{DASHBOARD}{account}{'' if event.livemode else '/test'}"
