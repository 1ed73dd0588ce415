"""`event.object`: stripe-python's own object, typed by the event type of the handler.

The handlers in this module are checked by mypy, as all tests are: a `type: ignore` that it does not need is an error.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, assert_type, get_args

import pytest
import stripe

from firstclaim import Context, Event, on
from firstclaim.event import parse_event
from firstclaim.sending.events import build_event, shipped_types
from firstclaim.server.event_types import snapshot_event_types
from firstclaim.testing import make_event
from tests import typed_events

STUB = Path(__file__).parents[2] / "service" / "firstclaim" / "declare.pyi"


# -- what mypy sees -----------------------------------------------------------------------------------


@on("invoice.paid")
async def one_type(event: Event[stripe.Invoice], context: Context) -> str:
    assert_type(event.object, stripe.Invoice)
    assert_type(event.object.currency, str)
    return event.object.nonsense  # type: ignore[attr-defined,no-any-return]


@on("checkout.session.completed", "checkout.session.expired")
def two_types_of_one_object(event: Event[stripe.checkout.Session], context: Context) -> None:
    assert_type(event.object, stripe.checkout.Session)


@on("customer.subscription.*")
async def a_wildcard_of_one_object(event: Event[stripe.Subscription], context: Context) -> None:
    assert_type(event.object, stripe.Subscription)


@on("invoice.paid", "charge.refunded")
async def two_objects(event: Event[stripe.Invoice | stripe.Charge], context: Context) -> None:
    assert_type(event.object, stripe.Invoice | stripe.Charge)


@on("invoice.paid")
async def a_wider_type(event: Event[stripe.StripeObject], context: Context) -> None:
    assert_type(event.object, stripe.StripeObject)


@on("*")
async def any_type(event: Event, context: Context) -> None:
    assert_type(event.object, Any)


@on("invoice.paid")
async def without_a_type(event: Event, context: Context) -> None:
    assert_type(event.object, Any)


@on("charge.refunded")  # type: ignore[arg-type]
async def another_object(event: Event[stripe.Invoice], context: Context) -> None:
    """The type of the event and the annotation do not agree: mypy says so."""


@on("customer.source.created")  # type: ignore[arg-type]
async def one_of_several(event: Event[stripe.Card], context: Context) -> None:
    """The source may be another object."""


@on("charge.succeeded")  # type: ignore[type-var]
async def another_result(event: Event[stripe.Charge], context: Context) -> int:
    """A handler returns its action or None: mypy says so."""
    return 1


@on("charge.succeeded")  # type: ignore[type-var]
def another_result_of_a_thread(event: Event[stripe.Charge], context: Context) -> bool:
    """So it does for a handler that is not async."""
    return True


@on("charge.succeeded")
async def perhaps_an_action(event: Event[stripe.Charge], context: Context) -> str | None:
    return None


def test_the_stub_is_what_the_installed_library_says() -> None:
    """`declare.pyi` is generated from the installed stripe-python. To renew it: `python -m tests.typed_events`."""
    assert STUB.read_text() == typed_events.stub()


def test_every_event_type_has_its_object() -> None:
    """Each type that stripe-python lists is in one overload, and each class in them is one that it has."""
    patterns = typed_events.patterns_by_object()
    types = [each for group in patterns.values() for each in group if not each.endswith("*")]
    assert sorted(types) == sorted(snapshot_event_types())
    for name in {each for union in patterns for each in union.split(" | ")}:
        found: Any = stripe
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        assert issubclass(found, stripe.StripeObject), name


def test_a_wildcard_is_typed_only_if_all_its_types_have_one_object() -> None:
    """`customer.*` matches customers, subscriptions, sources: it is not among the typed patterns."""
    typed = {pattern for group in typed_events.patterns_by_object().values() for pattern in group}
    assert {"invoice.*", "customer.subscription.*", "checkout.*"} <= typed
    assert not {"customer.*", "charge.*", "account.*", "*"} & typed


# -- what a handler gets ------------------------------------------------------------------------------


@pytest.mark.parametrize("event_type", [each for each in shipped_types() if not each.startswith("v1.")])
def test_the_object_is_of_the_class_that_mypy_is_told(event_type: str) -> None:
    """For every snapshot template: the class at run time is the one in the stub, with the event's values."""
    event = make_event(event_type)
    [declared] = map(typed_events.class_name, typed_events.object_names(event_type))
    assert type(event.object).__name__ == declared.rpartition(".")[2]
    assert type(event.object).__module__.startswith("stripe.")
    assert event.object.to_dict().keys() == event.data["object"].keys()  # decimals become `Decimal`
    assert event.object_id == event.data["object"].get("id") == getattr(event.object, "id", None)


def test_the_object_is_built_once_and_belongs_to_the_event_s_account() -> None:
    """The same object at each use, whose own requests go to the connected account."""
    event = make_event("invoice.paid", account="acct_1")
    assert event.object is event.object
    assert event.object.stripe_account == "acct_1"
    assert make_event("invoice.paid").object.stripe_account is None


def test_a_built_object_changes_nothing_else() -> None:
    """Equality, the representation, copies and `data` are those of an event whose object nobody asked for."""
    body = build_event("invoice.paid")
    asked, other = parse_event(body), parse_event(body)
    asked.object.currency = "xxx"
    assert asked == other
    assert asked.data["object"]["currency"] != "xxx"
    assert repr(asked) == repr(other)
    assert dataclasses.replace(asked, livemode=True).object.currency != "xxx"


def test_a_thin_event_has_no_object() -> None:
    """It says where the object is instead."""
    event = make_event("v1.billing.meter.error_report_triggered")
    with pytest.raises(AttributeError, match="related_object"):
        _ = event.object


def test_an_event_can_be_parametrized_at_run_time() -> None:
    """Annotations are evaluated in most handler modules."""
    assert get_args(Event[stripe.Invoice]) == (stripe.Invoice,)


def test_it_costs_only_when_asked_for() -> None:
    """Neither `import firstclaim` nor an event imports stripe; the first use of `object` does."""
    code = """
import sys
from firstclaim.event import parse_event
event = parse_event(sys.stdin.buffer.read())
assert "stripe" not in sys.modules
event.object.currency
assert "stripe" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], input=build_event("invoice.paid"), check=True, timeout=60)
