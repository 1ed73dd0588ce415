"""The claim protocol as a Promela model, searched completely by Spin; and each of its rules taken out in turn.

Guarantees: a search counts only when it was complete; a mutant counts as caught only when exactly the invariants
that it is said to break are broken. Bounds, numbers and what the model leaves out are in README.md beside this file.
"""

import re
from pathlib import Path

import pytest

from tests.model.spin import MODEL, Search, search

TEXT = MODEL.read_text()
README = MODEL.with_name("README.md").read_text()

pytestmark = [pytest.mark.model, pytest.mark.timeout(900), pytest.mark.usefixtures("tools")]


def bounds(deliveries: int, recoverers: int, claims: int, *more: str) -> tuple[str, ...]:
    """Lanes of deliveries and recovery loops at once, and claims of the event by take-over while faults last."""
    return (f"-DLANES={deliveries}", f"-DRECOVERERS={recoverers}", f"-DATTEMPTS={claims}", *more)


SEARCHES = {
    "two-deliveries": bounds(2, 1, 3),
    "two-recoverers": bounds(1, 2, 3),
    "two-of-each": bounds(2, 2, 1),
    "restored": bounds(1, 1, 3, "-DRESTORE"),
}
SETTLING = {
    "two-deliveries-settle": bounds(2, 1, 1, "-DFAIR"),
    "two-recoverers-settle": bounds(1, 2, 1, "-DFAIR"),
}

INVARIANTS = {number: name for name, number in re.findall(r"^bool (I(\d)_\w+) = false;$", TEXT, re.MULTILINE)}

# What each mutant breaks, by the invariants' numbers: these, and no other.
SMALL = bounds(1, 1, 2)
RESTORED = bounds(1, 1, 1, "-DRESTORE")
MUTANTS = {
    "M_200_ON_CLAIMED": (SMALL, "18"),
    "M_MARKER_BEFORE_COMMIT": (SMALL, "178"),
    "M_STATE_BY_ID_ALONE": (SMALL, "2"),
    "M_RECOVERY_BY_NX": (SMALL, "4"),
    "M_NO_FENCE": (SMALL, "35"),
    "M_MARKER_OVER_LOST_COMMIT": (SMALL, "178"),
    "M_DEFERRED_ON_UNKNOWN": (SMALL, "18"),
    "M_MARK_APART": (SMALL, "2"),
    "M_LOCK_ALONE": (SMALL, "25"),
    "M_DISPATCH_WITHOUT_LOCK": (SMALL, "5"),
    "M_NO_ROW_LOCK": (SMALL, "3"),
    "M_NO_ATTEMPT": (SMALL, "5"),
    "M_TAKE_BACK_FROM_ANOTHER": (SMALL, "5"),
    "M_NEVER_LOOK_BACK": (SMALL, "4"),
    "M_UNKNOWN_IS_DONE": (SMALL, "6"),
    "M_UNWANTED_IS_MARKED": (SMALL, "8"),
    "M_UNWANTED_IS_SETTLED": (SMALL, "8"),
    "M_IGNORED_IS_OWNED": (SMALL, "8"),
    "M_SKIPPED_IS_OWNED": (SMALL, "8"),
    "M_ANY_EPOCH": (RESTORED, "18"),
    "M_GONE_IS_2XX": (RESTORED, "18"),
}
# Rules that only save time or load: without them no invariant breaks.
HARMLESS = ("M_ANY_LOCK", "M_MARKER_KEPT_AFTER_FAILURE", "M_UNWANTED_IS_INSERTED_BESIDE_A_LOCK")


def never_taken(found: Search, *excused: str, text: str = TEXT) -> list[str]:
    """The model's lines with a step that the search never took, without those whose comment says so."""
    lines = [text.splitlines()[line - 1] for line in sorted(found.unreached)]
    return [line for line in lines if not any(why in line for why in excused)]


def states_in_readme(name: str) -> int:
    """What the table of searches says."""
    row = re.search(rf"^\| `{name}` \|.*?\| ([\d,]+) states \|", README, re.MULTILINE)
    assert row is not None, f"README.md has no row for {name}"
    return int(row[1].replace(",", ""))


@pytest.mark.parametrize("name", SEARCHES)
def test_every_invariant_holds(tmp_path: Path, name: str) -> None:
    """Any faults, any interleaving within the bounds: no invariant breaks, every step is taken, the README is right."""
    found = search(tmp_path, *SEARCHES[name])
    assert found.clean, found
    excused = ["never reached"] if name == "restored" else ["never reached", "only after a restore"]
    assert never_taken(found, *excused) == []
    assert found.states == states_in_readme(name)


@pytest.mark.parametrize("name", SETTLING)
def test_it_settles_once_faults_stop(tmp_path: Path, name: str) -> None:
    """From the moment that faults stop, with every process still at work, a row that exists settles."""
    found = search(tmp_path, *SETTLING[name], liveness=True)
    assert found.clean, found
    assert found.states == states_in_readme(name)


@pytest.mark.parametrize("mutant", ["M_RECOVERY_BY_NX", "M_NEVER_LOOK_BACK"])
def test_without_the_rule_it_may_never_settle(tmp_path: Path, mutant: str) -> None:
    """The LTL property notices a recovery that stops at a marker, or that leaves abandoned rows alone."""
    found = search(tmp_path, *SMALL, "-DFAIR", f"-D{mutant}", liveness=True, optimise="-O0")
    assert found.violated == {"acceptance cycle"}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_the_rule_its_invariants_break(tmp_path: Path, mutant: str) -> None:
    """Of everything that the mutant can do, all of which is searched, exactly what the rule is for goes wrong."""
    switches, numbers = MUTANTS[mutant]
    found = search(tmp_path, *switches, f"-D{mutant}", go_on=True, optimise="-O0")
    assert found.complete, found
    assert found.violated == {INVARIANTS[number] for number in numbers}


@pytest.mark.parametrize("mutant", HARMLESS)
def test_safety_does_not_rest_on_redis(tmp_path: Path, mutant: str) -> None:
    """Marker and deletion by plain SET and DEL, a marker left after a failure: safety depends on the ledger alone."""
    found = search(tmp_path, *SMALL, f"-D{mutant}", optimise="-O0")
    assert found.clean, found


@pytest.mark.parametrize(("depth", "megabytes"), [(100, 1000), (50_000, 134)], ids=["depth", "memory"])
def test_a_search_cut_short_does_not_count(tmp_path: Path, depth: int, megabytes: int) -> None:
    """A search that runs out of depth or memory has found no error, and is neither complete nor clean."""
    found = search(tmp_path, *bounds(1, 1, 3), depth=depth, megabytes=megabytes, optimise="-O0")
    assert found.states > 0
    assert found.errors == 0
    assert not found.complete
    assert not found.clean


def test_a_step_that_is_never_taken_is_noticed(tmp_path: Path) -> None:
    """Nobody recovers, so nothing that only recovery does is reached, and the check above says so."""
    found = search(tmp_path, *bounds(1, 0, 1), go_on=True, optimise="-O0")
    assert [line for line in never_taken(found, "only after a restore") if "!is_lane" in line]
