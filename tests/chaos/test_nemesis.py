"""A short nemesis run, with every kind of fault once: nothing is lost and nothing is doubled."""

from pathlib import Path

import pytest

from tests.chaos.faults import LANES
from tests.chaos.nemesis import run

SEED = 20_260_101


@pytest.mark.timeout(900)  # a run that hangs; on two idle cores it takes a minute and a half
async def test_every_fault_at_once(tmp_path: Path) -> None:
    """Two builds under load and every fault there is: each event ends as designed, with one effect or none."""
    result = await run(SEED, 0.25, tmp_path)
    for title, counted in result.tables():
        print(title, *(f"{times:7}  {name}" for name, times in counted.items()), sep="\n")
    assert not result.violations, result.story()

    # The run has observed enough to prove something.
    assert {f"{lane}: {kind}" for lane, kinds in LANES.items() for kind in kinds} <= result.faults.keys()
    assert len(result.sender.sent) > 100
    assert result.compared > result.promised / 2
    said = {said[:2] for said in result.sender.results if said is not None}
    assert {(200, True), (200, False), (202, False), (500, False)} <= said
    assert any(row.attempt > 1 for row in result.evidence.rows.values())
    one_build = {order.event.id for order in result.sender.sent if order.one_build}
    assert result.acknowledged & one_build
    assert any(each.promised and not each.wanted and each.event_id in one_build for each in result.history.deliveries)
