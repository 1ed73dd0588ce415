"""`on`, typed by the event types that it is given.

Type checkers read `declare.pyi` instead: there, `@on("invoice.paid")` takes a handler of `Event[stripe.Invoice]`. It is
generated from the installed stripe-python (`python -m tests.typed_events`), and a test compares them.
"""

from firstclaim.registry import on

__all__ = ["on"]
