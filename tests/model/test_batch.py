"""Two events of a batch handler as a Promela model, searched completely by Spin; and each rule of batches taken out.

Guarantees: those of `test_model.py`, for `batch.pml`. Bounds, numbers and what the model leaves out are in README.md
beside this file.
"""

import re
from pathlib import Path

import pytest

from tests.model.spin import BATCH, search
from tests.model.test_model import never_taken, states_in_readme

TEXT = BATCH.read_text()

pytestmark = [pytest.mark.model, pytest.mark.timeout(300), pytest.mark.usefixtures("tools")]


def bounds(processes: int, claims: int, *more: str) -> tuple[str, ...]:
    """Processes at once, and claims of each event while faults last."""
    return (f"-DPROCESSES={processes}", f"-DATTEMPTS={claims}", *more)


SEARCHES = {"batch": bounds(2, 3)}
SETTLING = {"batch-settles": bounds(2, 1, "-DFAIR")}

INVARIANTS = {number: name for name, number in re.findall(r"^bool (B(\d)_\w+) = false;$", TEXT, re.MULTILINE)}

# What each mutant breaks, by the invariants' numbers: these, and no other. B8 is the LTL property.
SMALL = bounds(2, 2)
MUTANTS = {
    "M_HOLD_COUNT_IGNORED": "267",
    "M_HOLD_BY_ID_ALONE": "67",
    "M_MARK_COUNT_IGNORED": "14",
    "M_MARKER_BEFORE_ROW": "3",
    "M_ABANDONED_ENTERS_A_BATCH": "6",
    "M_FAILED_AMONG_FRESH": "9",
    "M_MATES_CHARGED": "5",
}
ENDLESS = ("M_BATCH_AGAIN", "M_LEFT_TO_NOBODY")


@pytest.mark.parametrize("name", SEARCHES)
def test_every_invariant_holds(tmp_path: Path, name: str) -> None:
    """Any faults, any interleaving within the bounds: no invariant breaks, every step is taken, the README is right."""
    found = search(tmp_path, *SEARCHES[name], model=BATCH)
    assert found.clean, found
    assert never_taken(found, "never reached", text=TEXT) == []
    assert found.states == states_in_readme(name)


@pytest.mark.parametrize("name", SETTLING)
def test_it_settles_once_faults_stop(tmp_path: Path, name: str) -> None:
    """From the moment that faults stop both events settle, also if the handler raises for ever at one of them."""
    found = search(tmp_path, *SETTLING[name], model=BATCH, liveness=True, optimise="-O0")
    assert found.clean, found
    assert never_taken(found, "never reached", text=TEXT) == []
    assert found.states == states_in_readme(name)


@pytest.mark.parametrize("mutant", ENDLESS)
def test_without_the_rule_it_may_never_settle(tmp_path: Path, mutant: str) -> None:
    """The LTL property notices a batch that is tried again as a batch, and rows that nobody takes up again."""
    switches = SETTLING["batch-settles"]
    found = search(tmp_path, *switches, f"-D{mutant}", model=BATCH, liveness=True, optimise="-O0")
    assert found.violated == {"acceptance cycle"}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_the_rule_its_invariants_break(tmp_path: Path, mutant: str) -> None:
    """Of everything that the mutant can do, all of which is searched, exactly what the rule is for goes wrong."""
    found = search(tmp_path, *SMALL, f"-D{mutant}", model=BATCH, go_on=True, optimise="-O0")
    assert found.complete, found
    assert found.violated == {INVARIANTS[number] for number in MUTANTS[mutant]}
