"""Two events of one key as a Promela model, searched completely by Spin; and each rule of keys taken out.

Guarantees: those of `test_model.py`, for `key.pml`. What the model leaves out is in README.md beside this file.
"""

import re
from pathlib import Path

import pytest

from tests.model.spin import MODEL, search
from tests.model.test_model import never_taken, states_in_readme

KEY = MODEL.with_name("key.pml")
TEXT = KEY.read_text()

pytestmark = [pytest.mark.model, pytest.mark.timeout(120), pytest.mark.usefixtures("tools")]

SEARCHES: dict[str, tuple[str, ...]] = {"key": ()}
INVARIANTS = {number: name for name, number in re.findall(r"^bool (K(\d)_\w+) = false;$", TEXT, re.MULTILINE)}
# What each mutant breaks, by the invariants' numbers: these, and no other.
MUTANTS = {
    "M_KEY_NOT_LOCKED": "1",
    "M_KEY_IGNORED": "1",
    "M_WAIT_IS_CHARGED": "2",
    "M_KEY_WAITED_FOR": "3",
}


def test_every_invariant_holds(tmp_path: Path) -> None:
    """Any faults, any interleaving: no invariant breaks, nothing gets stuck before both are completed."""
    found = search(tmp_path, *SEARCHES["key"], model=KEY)
    assert found.clean, found
    assert never_taken(found, "never reached", text=TEXT) == []
    assert found.states == states_in_readme("key")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_the_rule_its_invariants_break(tmp_path: Path, mutant: str) -> None:
    """Of everything that the mutant can do, all of which is searched, exactly what the rule is for goes wrong."""
    found = search(tmp_path, f"-D{mutant}", model=KEY, go_on=True, optimise="-O0")
    assert found.complete, found
    assert found.violated == {INVARIANTS[number] for number in MUTANTS[mutant]}
