"""Your code goes here, or in modules of your own named in `FIRSTCLAIM_HANDLERS`. Imports only `firstclaim`."""

from firstclaim.handlers.invoices import record_payment_failure

__all__ = ["record_payment_failure"]
