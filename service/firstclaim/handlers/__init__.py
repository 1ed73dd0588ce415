"""The shipped handlers. Yours go into modules that `FIRSTCLAIM_HANDLERS` names; they import only `firstclaim`."""

from firstclaim.handlers.invoices import record_payment_failures

__all__ = ["record_payment_failures"]
