"""`firstclaim reconcile` before it asks anybody: what `--since` takes, and the words of a progress."""

import pytest
import typer

from firstclaim.cli.reconcile import _fields, _refusals, _since, _words
from firstclaim.operations.reconcile import ReconcileProgress


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("3d", 259_200), ("720h", 2_592_000)]
)
def test_a_time_that_stripe_lists(text: str, seconds: int) -> None:
    """In seconds, up to 30 days."""
    assert _since(text) == seconds


@pytest.mark.parametrize("text", ["0s", "31d", "999999m", "721h"])
def test_a_time_that_stripe_does_not_list(text: str) -> None:
    """Nothing, or more than 30 days: a usage error that says why."""
    with pytest.raises(typer.BadParameter, match="at most 30d: Stripe lists no older events"):
        _since(text)


@pytest.mark.parametrize("text", ["", "3", "3 days", "-1d", "1.5h", "3w"])
def test_no_time(text: str) -> None:
    """A usage error that says how it is written."""
    with pytest.raises(typer.BadParameter, match="90s, 15m, 2h, 3d"):
        _since(text)


def test_a_tally_adds_up() -> None:
    """What was found is already here, missing or refused; of what is missing, a run that ends early leaves some."""
    progress = ReconcileProgress(found=10, missing=5, recorded=3, refused_events=2, refused=[("evt_1", "why")])
    assert _words(progress, complete=True, dry_run=False) == (
        "10 events found at Stripe: 3 already here, 3 recorded, 2 refused"
    )
    assert _words(progress, complete=False, dry_run=True) == (
        "10 events found at Stripe: 3 already here, 5 would be recorded, 2 refused; "
        "not finished: run it again, nothing is recorded twice"
    )
    fields = _fields(progress, complete=False, dry_run=False)
    assert (fields["found"], fields["already_here"], fields["recorded"], fields["missing"]) == (10, 3, 3, 2)
    assert _refusals(progress) == ["evt_1 is not recorded, it would be refused as a delivery too: why", "and 1 more"]
