"""The claim protocol as a Promela model, searched completely by Spin; and each of its rules taken out in turn.

Guarantees: `errors: 0` counts only when the search was complete, and a mutant counts as caught only by the
invariant that it is about. What the model leaves out is in README.md beside this file.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = HERE / "claim.pml"
TOOLS = ("spin", "gcc")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install spin gcc)"),
]

TWO_LANES = ("-DLANES=2", "-DRECOVERERS=1")
TWO_RECOVERERS = ("-DLANES=1", "-DRECOVERERS=2")
RESTORE = ("-DLANES=1", "-DRECOVERERS=1", "-DRESTORE")

INVARIANTS = {
    number: name for name, number in re.findall(r"^bool (I(\d)_\w+) = true;$", MODEL.read_text(), flags=re.MULTILINE)
}

# What each mutant breaks. Nothing else: with any other invariant armed, the same search was complete and found nothing.
ONE_CLAIM = (*TWO_LANES, "-DATTEMPTS=1")
TWO_CLAIMS = (*TWO_LANES, "-DATTEMPTS=2")
ONE_CLAIM_RESTORED = (*RESTORE, "-DATTEMPTS=1")
MUTANTS = {
    "M_ANSWER_ON_CLAIMED": (ONE_CLAIM, "1"),
    "M_DEFERRED_ON_UNKNOWN": (ONE_CLAIM, "1"),
    "M_MARK_EARLY": (ONE_CLAIM, "17"),
    "M_MARK_ON_UNKNOWN": (ONE_CLAIM, "17"),
    "M_BY_ID": (ONE_CLAIM, "2"),
    "M_MARK_APART": (ONE_CLAIM, "2"),
    "M_LOCK_ALONE": (ONE_CLAIM, "25"),
    "M_NO_FENCE": (TWO_CLAIMS, "35"),
    "M_NO_ROW_LOCK": (TWO_CLAIMS, "3"),
    "M_NO_ATTEMPT": (TWO_CLAIMS, "5"),
    "M_NX_ONLY": (ONE_CLAIM, "4"),
    "M_NEVER_LOOK_BACK": (ONE_CLAIM, "4"),
    "M_UNKNOWN_IS_DONE": (ONE_CLAIM, "6"),
    "M_ANY_EPOCH": (ONE_CLAIM_RESTORED, "1"),
    "M_GONE_IS_2XX": (ONE_CLAIM_RESTORED, "1"),
}


@dataclass(frozen=True, slots=True)
class Search:
    """What pan said."""

    complete: bool
    errors: int
    violated: str | None
    unreached: frozenset[str]

    @property
    def clean(self) -> bool:
        return self.complete and self.errors == 0


def search(folder: Path, *switches: str, liveness: bool = False, optimise: str = "-O2") -> Search:
    """Generate the verifier, compile it, run it: an exact search, no bitstate, no hash compaction, no reduction."""
    subprocess.run(["spin", *switches, "-a", str(MODEL)], cwd=folder, check=True, capture_output=True)
    kind = ["-DCOLLAPSE"] if liveness else ["-DSAFETY"]
    options = [optimise, "-w", "-DNOREDUCE", "-DMEMLIM=1900", *kind]
    subprocess.run(["gcc", *options, "-o", "pan", "pan.c"], cwd=folder, check=True, capture_output=True)
    flags = ["-a", "-f"] if liveness else []
    said = subprocess.run(
        ["./pan", "-w26", "-m1000000", *flags], cwd=folder, check=True, capture_output=True, text=True
    )
    return understood(said.stdout)


def understood(said: str) -> Search:
    """Read pan's report; without one, or with an error, the search was not complete."""
    errors = re.search(r"errors: (\d+)$", said, flags=re.MULTILINE)
    violated = re.search(r"assertion violated (?:\(*)(\w+)|(acceptance cycle|invalid end state) \(at", said)
    assert errors is not None, said
    cut_short = ("Search not completed", "max search depth too small", "memory", "hash-compact", "Bit statespace")
    report = re.sub(r"Stats on memory usage.*?total actual memory usage", "", said, flags=re.DOTALL)
    return Search(
        complete="Full statespace search for:" in said and not any(words in report for words in cut_short),
        errors=int(errors[1]),
        violated=next(filter(None, violated.groups())) if violated else None,
        unreached=frozenset(re.findall(r'claim\.pml:\d+, state \d+, "(.*)"', said)),
    )


@pytest.mark.parametrize("scenario", [TWO_LANES, TWO_RECOVERERS], ids=["two-lanes", "two-recoverers"])
def test_every_invariant_holds(tmp_path: Path, scenario: tuple[str, ...]) -> None:
    """Up to three claims of one event, any faults, any interleaving: no invariant breaks and every step is reached."""
    found = search(tmp_path, *scenario)
    assert found.clean, found
    # The marker of another epoch needs a restore; the mark that finds its row changed is what the row lock rules out.
    assert found.unreached <= {"step = 3", "transaction[me] = 0", "-end-"}


def test_a_restore_breaks_no_promise_made_after_it(tmp_path: Path) -> None:
    """With the ledger set back and Redis intact, nothing read after the restore is answered by what was before it."""
    assert search(tmp_path, *RESTORE, "-DATTEMPTS=2").clean


@pytest.mark.parametrize("scenario", [TWO_LANES, TWO_RECOVERERS], ids=["two-lanes", "two-recoverers"])
def test_it_settles_once_faults_stop(tmp_path: Path, scenario: tuple[str, ...]) -> None:
    """From the moment that faults stop, with every process still at work, a row that exists settles."""
    assert search(tmp_path, *scenario, "-DATTEMPTS=1", "-DFAIR", "-DONLY=4", liveness=True).clean


@pytest.mark.parametrize("mutant", ["M_NX_ONLY", "M_NEVER_LOOK_BACK"])
def test_without_the_rule_it_may_never_settle(tmp_path: Path, mutant: str) -> None:
    """The LTL property notices a recovery that stops at a marker, or that leaves abandoned rows alone."""
    found = search(tmp_path, *ONE_CLAIM, "-DFAIR", "-DONLY=4", f"-D{mutant}", liveness=True)
    assert found.violated == "acceptance cycle"


@pytest.mark.parametrize(("mutant", "number"), [(name, n) for name, (_, numbers) in MUTANTS.items() for n in numbers])
def test_without_the_rule_the_invariant_breaks(tmp_path: Path, mutant: str, number: str) -> None:
    """Spin finds the violation of the very invariant that the rule is for, which alone is armed."""
    scenario, _ = MUTANTS[mutant]
    found = search(tmp_path, *scenario, f"-D{mutant}", f"-DONLY={number}", optimise="-O0")
    assert (found.errors, found.violated) == (1, INVARIANTS[number])


def test_safety_does_not_rest_on_redis_tokens(tmp_path: Path) -> None:
    """Marker and deletion by plain SET and DEL break no invariant: the ledger alone carries safety."""
    assert search(tmp_path, *TWO_CLAIMS, "-DM_ANY_LOCK").clean


def test_the_readme_has_the_same_mutants() -> None:
    """README.md names every mutant with the invariants that it breaks, and no other."""
    readme = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| `(M_\w+)` \|.*\| ((?:I\d(?:, )?)+) \|$", readme, flags=re.MULTILINE)
    assert dict(rows) == {name: ", ".join(f"I{n}" for n in numbers) for name, (_, numbers) in MUTANTS.items()}
