"""The shipped handler, without a database: what it reads from an invoice, and what it refuses."""

from datetime import UTC, datetime
from typing import Any, cast

import pytest

from firstclaim import BatchContext, Event, Permanent
from firstclaim.event import parse_event
from firstclaim.handlers.invoices import REMEMBER, newest, payment_failure, record_payment_failures
from firstclaim.registry import Registry
from tests.fixtures import MISSING, event_body, old_shape_payment_failed


def failed(**invoice: Any) -> Event:
    return parse_event(event_body(data={"object": invoice}))


class Recorder:
    """Replaces the transaction; the effect of the statement is tested on a real server."""

    def __init__(self) -> None:
        self.executed: list[tuple[Any, ...]] = []

    async def fetch(self, *statement: Any) -> None:
        self.executed.append(statement)


def test_it_is_registered_for_its_type() -> None:
    """The default handlers module dispatches a failed payment to the shipped handler."""
    handler = Registry.load(["firstclaim.handlers"]).find("invoice.payment_failed")
    assert handler is not None
    assert handler.function is record_payment_failures
    assert handler.batch


async def test_it_writes_one_row_for_each_event_and_names_its_action() -> None:
    """A batch is one statement on the handler's own transaction, answered `payment_failure_recorded`."""
    events, recorder = [failed(id="in_2"), failed(id="in_1")], Recorder()
    assert await record_payment_failures(events, cast(BatchContext, recorder)) == "payment_failure_recorded"
    columns = zip(payment_failure(events[1]).values(), payment_failure(events[0]).values(), strict=True)
    assert recorder.executed == [(REMEMBER, *map(list, columns))]


def test_of_two_events_of_one_invoice_the_newer_attempt_is_kept() -> None:
    """Of equal attempts the first to arrive; and one row for each invoice, in order: no two batches can deadlock."""
    arrived = [("b", 2), ("a", 1), ("b", 3), ("b", 3)]
    rows = [payment_failure(failed(id=invoice, attempt_count=count)) for invoice, count in arrived]
    assert newest(rows) == [rows[1], rows[2]]
    assert newest([rows[2], rows[0], rows[3]]) == [rows[2]]


def test_the_new_shape_is_read_whole() -> None:
    """Every column comes from the field that Stripe documents for it, since API version 2025-03-31."""
    event = parse_event(
        event_body(
            id="evt_new",
            created=1_793_610_041,
            data={
                "object": {
                    "id": "in_1",
                    "customer": "cus_1",
                    "parent": {"subscription_details": {"subscription": "sub_1"}},
                    "amount_due": 2599,
                    "currency": "eur",
                    "attempt_count": 3,
                    "next_payment_attempt": 1_793_869_241,
                }
            },
        )
    )
    assert payment_failure(event) == {
        "invoice": "in_1",
        "customer": "cus_1",
        "subscription": "sub_1",
        "amount_due_minor": 2599,
        "currency": "eur",
        "attempt_count": 3,
        "next_attempt_at": datetime(2026, 11, 5, 9, 0, 41, tzinfo=UTC),
        "failed_at": datetime(2026, 11, 2, 9, 0, 41, tzinfo=UTC),
        "event_id": "evt_new",
    }


def test_the_old_shape_gives_the_same_row() -> None:
    """The payload of an old API version, with `subscription` at the top level, gives the same row."""
    event = parse_event(old_shape_payment_failed(data={"object": {"subscription": "sub_old"}}))
    assert "parent" not in event.data["object"]
    row = payment_failure(event)
    assert row["subscription"] == "sub_old"
    assert row.keys() == payment_failure(failed()).keys()
    assert None not in row.values()


@pytest.mark.parametrize(
    ("invoice", "subscription"),
    [
        (
            {"parent": {"subscription_details": {"subscription": {"id": "sub_x", "object": "subscription"}}}},
            "sub_x",
        ),
        ({"parent": None, "subscription": {"id": "sub_x", "object": "subscription"}}, "sub_x"),
        ({"parent": None, "subscription": "sub_x"}, "sub_x"),
        ({"parent": None, "subscription": None}, None),
        ({"parent": None}, None),
        ({"parent": {"subscription_details": None, "type": "quote_details"}}, None),
        (
            {"parent": {"subscription_details": {"subscription": "sub_new"}}, "subscription": "sub_old"},
            "sub_new",
        ),
    ],
)
def test_a_subscription_is_found_wherever_it_is(invoice: dict[str, Any], subscription: str | None) -> None:
    """Either place, an id or the expanded object; without one the invoice is one-off, not an error."""
    assert payment_failure(failed(**invoice))["subscription"] == subscription


@pytest.mark.parametrize(
    ("customer", "expected"),
    [
        ("cus_1", "cus_1"),
        ({"id": "cus_2", "object": "customer", "email": "jo@example.com"}, "cus_2"),
        ({"id": "cus_3", "object": "customer", "deleted": True}, "cus_3"),
        (None, None),
        (MISSING, None),
    ],
)
def test_a_customer_is_an_id_an_object_or_nobody(customer: object, expected: str | None) -> None:
    """All shapes of an expandable field give its id, and of an expanded customer nothing but the id."""
    assert payment_failure(failed(customer=customer))["customer"] == expected


@pytest.mark.parametrize("value", [None, MISSING])
def test_the_last_attempt_has_no_next(value: object) -> None:
    """When Stripe has given up, there is no next attempt, and that is not an error."""
    assert payment_failure(failed(next_payment_attempt=value))["next_attempt_at"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("amount_due", 0),
        ("amount_due", 2**63 - 1),
        ("attempt_count", 0),
        ("attempt_count", 2**31 - 1),
        ("next_payment_attempt", 0),
        ("next_payment_attempt", 253_402_300_799),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field: str, value: int) -> None:
    """A value that the column can hold is accepted."""
    assert payment_failure(failed(**{field: value}))


@pytest.mark.parametrize("value", [MISSING, None])
def test_what_was_not_sent_is_unknown(value: object) -> None:
    """A field that was not sent is null in the row, never invented; a missing attempt count is below all others."""
    row = payment_failure(failed(amount_due=value, currency=value, attempt_count=value))
    assert (row["amount_due_minor"], row["currency"], row["attempt_count"]) == (None, None, 0)


@pytest.mark.parametrize("value", [MISSING, None])
def test_no_id_is_no_invoice(value: object) -> None:
    """An invoice without an id is refused: the id is the key of the row."""
    with pytest.raises(Permanent, match=r"^not an invoice: id must be a string"):
        payment_failure(failed(id=value))


@pytest.mark.parametrize("value", ["", "a\0b", "x" * 256, 7, True, [], {}])
@pytest.mark.parametrize("field", ["id", "currency"])
def test_a_required_text_is_checked(field: str, value: object) -> None:
    """A text that its column cannot hold is refused before any SQL."""
    with pytest.raises(Permanent, match=rf"^not an invoice: {field} must be a string"):
        payment_failure(failed(**{field: value}))


@pytest.mark.parametrize("value", ["2000", 19.99, True, -1, 2**63, 1e30, [], {}])
@pytest.mark.parametrize("field", ["amount_due", "attempt_count"])
def test_a_required_number_is_checked(field: str, value: object) -> None:
    """A number that its column cannot hold is refused before any SQL."""
    with pytest.raises(Permanent, match=rf"^not an invoice: {field} must be an integer from 0 to "):
        payment_failure(failed(**{field: value}))


def test_an_attempt_count_has_the_range_of_its_column() -> None:
    """`attempt_count` is an `integer`: one beyond it fits `amount_due`, and is refused here."""
    assert payment_failure(failed(amount_due=2**31))
    with pytest.raises(Permanent, match="attempt_count"):
        payment_failure(failed(attempt_count=2**31))


@pytest.mark.parametrize("value", ["soon", 1.5, True, -1, 253_402_300_800, 2**63, []])
def test_an_instant_is_checked(value: object) -> None:
    """An instant that no datetime can hold is refused, instead of overflowing."""
    with pytest.raises(Permanent, match=r"^not an invoice: next_payment_attempt must be an integer"):
        payment_failure(failed(next_payment_attempt=value))


@pytest.mark.parametrize(
    ("invoice", "field"),
    [
        ({"customer": 7}, "customer"),
        ({"customer": "cus\0"}, "customer"),
        ({"customer": ["cus_1"]}, "customer"),
        ({"customer": {"object": "customer"}}, "customer.id"),
        ({"parent": None, "subscription": False}, "subscription"),
        ({"parent": None, "subscription": {"id": 1}}, "subscription.id"),
        ({"parent": "sub_1"}, "parent"),
        ({"parent": {"subscription_details": "sub_1"}}, "parent.subscription_details"),
        (
            {"parent": {"subscription_details": {"subscription": 1}}},
            "parent.subscription_details.subscription",
        ),
    ],
)
def test_a_reference_is_checked(invoice: dict[str, Any], field: str) -> None:
    """A reference of a shape that Stripe never sends is refused by its name."""
    with pytest.raises(Permanent, match=rf"^not an invoice: {field} must be "):
        payment_failure(failed(**invoice))


@pytest.mark.parametrize("body", [event_body("customer.created"), event_body(data={"object": {"object": 7}})])
def test_another_object_is_refused(body: bytes) -> None:
    """Another kind of object is not an invoice, whatever the event's type."""
    with pytest.raises(Permanent, match=r"not an invoice: data\.object is another object"):
        payment_failure(parse_event(body))


@pytest.mark.parametrize("data", [MISSING, {}, {"object": None}, {"object": [1]}])
def test_a_thin_event_is_refused(data: object) -> None:
    """A thin event, which the parser accepts without an object, is refused here."""
    thin = parse_event(event_body("v1.billing.meter.error_report_triggered", data=data))
    with pytest.raises(Permanent, match="not an invoice"):
        payment_failure(thin)


def test_a_refusal_holds_no_customer_data() -> None:
    """The reason is kept in the ledger: it names the field, never its value."""
    with pytest.raises(Permanent) as refused:
        payment_failure(failed(customer={"email": "jo@example.com", "id": ["jo@example.com"]}))
    assert "jo@" not in str(refused.value)


def test_nothing_sensitive_is_copied() -> None:
    """No name, address or e-mail of the invoice reaches the row."""
    row = payment_failure(failed(customer_email="jo@example.com", customer_name="Jo Example"))
    assert not [value for value in row.values() if "Jo Example" in str(value) or "@" in str(value)]


def test_a_row_is_written_in_the_order_of_its_columns() -> None:
    """The statement has numbered parameters: they are the columns of `payment_failure`, in their order."""
    columns = REMEMBER.partition("(")[2].partition(")")[0].replace(",", " ").split()
    assert columns == list(payment_failure(failed(id="in_1")))


def test_the_newest_is_chosen_by_attempt_only() -> None:
    """The statement compares attempt counts, and no clock."""
    assert REMEMBER.rstrip().endswith("WHERE excluded.attempt_count > known.attempt_count")
