"""What the shop does when Stripe tells it something."""

import stripe

from firstclaim import Context, Event, Permanent, Retry, on
from service.models import Access, Customer


@on("invoice.paid")
async def grant_access(event: Event[stripe.Invoice], context: Context) -> str:
    """Grant what was paid for. The customer may not be known yet: Stripe guarantees no order."""
    invoice = event.object
    if invoice.currency != "eur":
        raise Permanent("the shop only sells in euros")
    async with context.session() as session:
        customer = await session.get(Customer, str(invoice.customer))
        if customer is None:
            raise Retry("the customer is not known yet", after=0.2)
        session.add(Access(invoice=str(event.object_id), customer=customer))
    return "access_granted"


@on("customer.created")
def remember_customer(event: Event[stripe.Customer], context: Context) -> str:
    """Keep the customer. A sync handler: it runs in a thread."""
    with context.sync_session() as session:
        session.add(Customer(id=event.object.id, email=event.object.email))
    return "customer_remembered"
