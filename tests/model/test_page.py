"""What the model's page says is what the model has: checked in every run, without Spin.

Guarantees: no mutant and no search is in one of the three (page, tests, models) and not in the others.
"""

import re

from tests.model import test_batch as batch
from tests.model import test_key as key
from tests.model.spin import MODEL, understood
from tests.model.test_model import HARMLESS, INVARIANTS, MUTANTS, README, SEARCHES, SETTLING


def test_the_page_has_the_same_mutants() -> None:
    """README.md names every mutant with the invariants that it breaks, and no other."""
    rows = dict(re.findall(r"^\| `(M_\w+)` \|.*\| ((?:[IBK]\d(?:, )?)+|nothing) \|", README, flags=re.MULTILINE))
    broken = {name: ", ".join(f"I{number}" for number in numbers) for name, (_, numbers) in MUTANTS.items()}
    together = {name: ", ".join(f"B{number}" for number in numbers) for name, numbers in batch.MUTANTS.items()}
    keyed = {name: ", ".join(f"K{number}" for number in numbers) for name, numbers in key.MUTANTS.items()}
    assert rows == broken | dict.fromkeys(HARMLESS, "nothing") | together | dict.fromkeys(batch.ENDLESS, "B8") | keyed


def test_the_models_have_the_same_mutants() -> None:
    """Every switch that weakens a model is searched, and every mutant that is searched is there."""
    assert set(re.findall(r"\bM_[A-Z0-9_]+", MODEL.read_text())) == set(MUTANTS) | set(HARMLESS)
    assert set(re.findall(r"\bM_[A-Z0-9_]+", batch.TEXT)) == set(batch.MUTANTS) | set(batch.ENDLESS)
    assert set(re.findall(r"\bM_[A-Z0-9_]+", key.TEXT)) == set(key.MUTANTS)


def test_every_invariant_is_missed_by_a_mutant() -> None:
    """An invariant that no mutant breaks would not be tested."""
    assert sorted(INVARIANTS) == sorted({number for _, numbers in MUTANTS.values() for number in numbers})
    assert sorted(batch.INVARIANTS) == sorted(set("".join(batch.MUTANTS.values())))
    assert sorted(key.INVARIANTS) == sorted(set("".join(key.MUTANTS.values())))


def test_the_page_has_the_same_searches() -> None:
    """README.md has a row of numbers for every search, and no other."""
    searches = set(SEARCHES) | set(SETTLING) | set(batch.SEARCHES) | set(batch.SETTLING) | set(key.SEARCHES)
    assert set(re.findall(r"^\| `([a-z-]+)` \|", README, flags=re.MULTILINE)) == searches


def test_what_pan_says_is_understood() -> None:
    """Every violation by the invariant's name, each once, and the lines that were not reached."""
    said = """
pan:1: assertion violated (I1_a_2xx_has_a_row||((row!=0)||(asked!=epoch))) (at depth 28)
pan:2: assertion violated (I7_a_current_marker_has_a_row||(key!=6)) (at depth 22)
pan:3: assertion violated (I1_a_2xx_has_a_row||((row!=0)||(asked!=epoch))) (at depth 30)
pan:4: invalid end state (at depth 3)
Full statespace search for:
State-vector 48 byte, depth reached 2000, errors: 4
    20599 states, stored
   57.117\ttotal actual memory usage
unreached in proctype worker
\t/somewhere/claim.pml:306, state 25, "step = 3"
\t/somewhere/claim.pml:516, state 539, "-end-"
"""
    found = understood(said)
    assert found.violated == {"I1_a_2xx_has_a_row", "I7_a_current_marker_has_a_row", "invalid end state"}
    assert (found.complete, found.errors, found.states, found.depth) == (True, 4, 20599, 2000)
    assert found.unreached == {306, 516}
    assert not found.clean
