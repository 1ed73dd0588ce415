"""Your code goes here, or in modules of your own named in `FIRSTCLAIM_HANDLERS`. Imports only `service`."""

from service.handlers.invoices import record_payment_failure

__all__ = ["record_payment_failure"]
