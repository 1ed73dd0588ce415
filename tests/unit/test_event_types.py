"""Patterns of handlers that no event type of Stripe's matches, and what may have been meant."""

import pytest

from firstclaim.sending.events import shipped_types
from firstclaim.server.event_types import known_event_types, unmatched


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "invoice.paid",
        "invoice.*",
        "customer.subscription.*",
        "v1.billing.meter.error_report_triggered",
        "v1.billing.*",
        "v2.core.*",
        *shipped_types(),
    ],
)
def test_a_pattern_that_matches_is_not_told(pattern: str) -> None:
    """An exact type, a family of types and `*` match, snapshot and thin."""
    assert unmatched([pattern]) == []


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("invoice.payed", "invoice.paid"),
        ("custmer.subscription.*", "customer.subscription.*"),
        ("invoice.paid.*", None),
        ("v1.billing.metr.*", "v1.billing.meter.*"),
        ("invoice", None),
    ],
)
def test_a_pattern_that_matches_nothing_is_told(pattern: str, meant: str | None) -> None:
    """A misspelt type or family is told with the nearest one that exists."""
    [told] = unmatched(["invoice.paid", pattern])
    assert told.startswith(pattern)
    assert meant is None or told == f"{pattern} (did you mean {meant}?)"


def test_both_kinds_of_types_are_known() -> None:
    """The installed library lists snapshot and thin events: if it moves one list, this test says so."""
    types = known_event_types()
    assert sum(each.startswith("v2.") for each in types) > 10
    assert sum(not each.startswith(("v1.", "v2.")) for each in types) > 200


def test_a_library_without_the_list_of_thin_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that list nothing is said of thin types, and snapshot types are still checked."""
    monkeypatch.setattr("firstclaim.server.event_types._thin_event_types", frozenset)
    assert unmatched(["v1.billing.nothing", "v2.*"]) == []
    assert unmatched(["invoice.payed"]) != []
