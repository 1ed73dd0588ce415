"""`make_event`: events as Stripe sends them, changed as a test needs it, and a reason where that cannot be."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from firstclaim.sending.events import shipped_types
from firstclaim.testing import make_event


@pytest.mark.parametrize("event_type", shipped_types())
def test_every_template_gives_an_event(event_type: str) -> None:
    """Each shipped type gives an event of that type, and a new one on each call."""
    event, other = make_event(event_type), make_event(event_type)
    assert event.type == other.type == event_type
    assert event.id != other.id
    assert abs((datetime.now(UTC) - event.created).total_seconds()) < 60


def test_overrides_are_merged() -> None:
    """Fields of the event and of its object are replaced, and what is not named stays."""
    event = make_event(
        "customer.subscription.updated",
        id="evt_1",
        livemode=True,
        account="acct_1",
        object={"status": "past_due", "metadata": {"plan": "gold"}},
        data={"previous_attributes": {"status": "active"}},
    )
    assert (event.id, event.livemode, event.account) == ("evt_1", True, "acct_1")
    subscription = event.data["object"]
    assert (subscription["status"], subscription["metadata"]["plan"]) == ("past_due", "gold")
    assert subscription["object"] == "subscription"
    assert event.data["previous_attributes"]["status"] == "active"
    assert event.payload["data"] is event.data


def test_an_event_of_another_api_version_may_have_other_fields() -> None:
    """What the template's version does not have is accepted together with `api_version`."""
    event = make_event("invoice.paid", api_version="2024-06-20", object={"subscription": "sub_1"})
    assert event.data["object"]["subscription"] == "sub_1"


def test_a_list_is_replaced() -> None:
    """Only dicts are merged."""
    assert make_event("invoice.paid", object={"lines": {"data": []}}).data["object"]["lines"]["data"] == []


def test_a_type_without_a_template_takes_its_whole_object() -> None:
    """Any type can be made from an object, and has the fields of an event around it."""
    event = make_event("charge.dispute.created", object={"id": "dp_1", "object": "dispute"})
    assert (event.type, event.object_id) == ("charge.dispute.created", "dp_1")
    assert event.data == {"object": {"id": "dp_1", "object": "dispute"}}
    assert event.api_version


@pytest.mark.parametrize(
    ("event_type", "overrides", "reason"),
    [
        ("charge.dispute.created", {}, "no template for 'charge.dispute.created': pass its whole object"),
        ("invoice.paid", {"id": "evt 1"}, '"id" is missing or malformed'),
        ("invoice.paid", {"livemode": "yes"}, '"livemode" must be true or false'),
        ("invoice.paid", {"object": None}, '"data.object" must be an object'),
        ("invoice.paid", {"object": {"due_date": object()}}, "not JSON serializable"),
        ("invoice.paid", {"livemod": True}, "there is no 'livemod'; did you mean livemode?"),
        ("invoice.paid", {"object": {"currncy": "usd"}}, "there is no 'currncy'; did you mean currency?"),
        ("invoice.paid", {"data": {"objct": {}}}, "there is no 'objct'; did you mean object?"),
        ("charge.dispute.created", {"livemod": True, "object": {"id": "dp_1"}}, "did you mean livemode?"),
        ("bad type", {"object": {}}, '"type" is missing or malformed'),
    ],
)
def test_what_stripe_cannot_send_is_refused(event_type: str, overrides: dict[str, Any], reason: str) -> None:
    """The reason is the one that the service would give, or says what to pass."""
    with pytest.raises(ValueError, match=r"make_event") as refused:
        make_event(event_type, **overrides)
    assert reason in str(refused.value)


def test_the_endpoint_of_an_event() -> None:
    """An event for a test has the endpoint's name that is given, or none, as one that the service received."""
    assert make_event("invoice.paid", endpoint="eu").endpoint == "eu"
    assert make_event("invoice.paid").endpoint is None


LOADED = """
import sys, json
before = set(sys.modules)
import firstclaim.pytest_plugin
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_plugin_costs_nothing_while_it_is_not_used() -> None:
    """Beside what pytest and its plugins have loaded, loading the plugin imports firstclaim's public names alone."""
    code = f"import pytest, pytest_asyncio, dataclasses, importlib.metadata\n{LOADED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(done.stdout))
    assert "firstclaim" in loaded
    assert not loaded & {"sqlalchemy", "asyncpg", "stripe", "pydantic", "starlette", "orjson", "structlog", "redis"}


def test_the_kit_does_not_need_pytest() -> None:
    """`firstclaim.testing` works under any runner: it imports neither pytest nor a plugin of it."""
    code = "import sys, firstclaim.testing; assert not {'pytest', '_pytest', 'pytest_asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
