"""`firstclaim reconcile` before it connects to anything: the values of `--since`, and the text of the result."""

import pytest
import typer

from firstclaim.cli.reconcile import _fields, _refusals, _since, _summary
from firstclaim.operations.reconcile import ReconcileProgress


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("3d", 259_200), ("720h", 2_592_000)]
)
def test_a_time_that_stripe_lists(text: str, seconds: int) -> None:
    """A duration of up to 30 days is converted to seconds."""
    assert _since(text) == seconds


@pytest.mark.parametrize("text", ["0s", "31d", "999999m", "721h"])
def test_a_time_that_stripe_does_not_list(text: str) -> None:
    """Zero, or more than 30 days: a usage error with the reason."""
    with pytest.raises(typer.BadParameter, match="at most 30d: Stripe lists no older events"):
        _since(text)


@pytest.mark.parametrize("text", ["", "3", "3 days", "-1d", "1.5h", "3w"])
def test_a_text_that_is_no_duration(text: str) -> None:
    """Text that is no duration: a usage error with examples."""
    with pytest.raises(typer.BadParameter, match="90s, 15m, 2h, 3d"):
        _since(text)


def test_the_counts_add_up() -> None:
    """Each event listed was already recorded, is missing or was refused; an interrupted run leaves some missing."""
    progress = ReconcileProgress(found=10, missing=5, recorded=3, refused_events=2, refused=[("evt_1", "why")])
    assert _summary(progress, complete=True, dry_run=False) == (
        "10 events listed by Stripe: 3 already in the ledger, 3 recorded, 2 refused"
    )
    assert _summary(progress, complete=False, dry_run=True) == (
        "10 events listed by Stripe: 3 already in the ledger, 5 would be recorded, 2 refused. "
        "The run is incomplete: repeat it, no event is recorded twice."
    )
    fields = _fields(progress, complete=False, dry_run=False)
    assert (fields["found"], fields["already_here"], fields["recorded"], fields["missing"]) == (10, 3, 3, 2)
    assert _refusals(progress) == [
        "evt_1 was not recorded, because its delivery would be rejected too: why",
        "and 1 more",
    ]
