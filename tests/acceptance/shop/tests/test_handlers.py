"""The shop's tests of its handlers."""

import pytest
from service.handlers import grant_access, remember_customer
from service.models import Access, Customer
from sqlalchemy import select

from firstclaim import Permanent, Retry
from firstclaim.testing import SyncTransaction, Transaction, make_event

PAID = {"currency": "eur", "customer": "cus_1"}


async def test_a_paid_invoice_grants_access(firstclaim_transaction: Transaction) -> None:
    """To the customer, who is known."""
    async with firstclaim_transaction.session() as session:
        session.add(Customer(id="cus_1", email=None))
    event = make_event("invoice.paid", object=PAID)
    assert await firstclaim_transaction.deliver(grant_access, event) == "access_granted"
    async with firstclaim_transaction.session() as session:
        access = (await session.scalars(select(Access))).one()
        assert (access.invoice, access.customer_id) == (event.object_id, "cus_1")


async def test_an_unknown_customer_is_waited_for(firstclaim_transaction: Transaction) -> None:
    """Stripe may send the invoice first."""
    with pytest.raises(Retry) as retry:
        await firstclaim_transaction.deliver(grant_access, make_event("invoice.paid", object=PAID))
    assert retry.value.after == 0.2


async def test_dollars_are_refused_for_good(firstclaim_transaction: Transaction) -> None:
    """No retry changes the currency."""
    with pytest.raises(Permanent, match="euros"):
        await firstclaim_transaction.deliver(grant_access, make_event("invoice.paid", object={"currency": "usd"}))


def test_a_customer_is_remembered(firstclaim_sync_transaction: SyncTransaction) -> None:
    """By a sync handler, in a sync test; what the async tests wrote is gone."""
    event = make_event("customer.created", object={"id": "cus_1", "email": "a@example.com"})
    assert firstclaim_sync_transaction.deliver(remember_customer, event) == "customer_remembered"
    with firstclaim_sync_transaction.session() as session:
        assert session.scalars(select(Customer.email)).all() == ["a@example.com"]
