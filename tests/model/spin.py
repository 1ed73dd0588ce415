"""Runs Spin on a model with its switches, and parses the result of the search.

Guarantees: `complete` only when every state was visited and compared in full: not bitstate, no hash compaction,
no partial order reduction, and neither the depth nor the memory was too small.
"""

import os
import re
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("claim.pml")
BATCH = MODEL.with_name("batch.pml")
# A search mostly waits for memory, at random places in it: with large pages a fifth less. Without glibc: no effect.
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_CUT_SHORT = ("Search not completed", "max search depth too small", "hash-compact", "Bit statespace")


@dataclass(frozen=True, slots=True)
class Search:
    """A report of pan. `violated`: names of invariants, "acceptance cycle", "invalid end state"."""

    complete: bool
    errors: int
    violated: frozenset[str]
    unreached: frozenset[int]  # lines of the model
    states: int
    depth: int
    megabytes: float
    cpu_seconds: float

    @property
    def clean(self) -> bool:
        return self.complete and self.errors == 0 and not self.violated

    def __str__(self) -> str:
        return (
            f"{self.states:,} states, depth {self.depth:,}, {self.megabytes:.0f} MB, {self.cpu_seconds:.0f} s of CPU, "
            f"{'complete' if self.complete else 'CUT SHORT'}, violated: {', '.join(sorted(self.violated)) or 'nothing'}"
        )


def search(
    folder: Path,
    *switches: str,
    model: Path = MODEL,
    liveness: bool = False,
    go_on: bool = False,
    optimise: str = "-O2",
    depth: int = 2_000_000,
    megabytes: int = 3500,
) -> Search:
    """Generate the verifier, compile it, run it. `go_on`: search all of it, whatever is violated."""
    subprocess.run(["spin", *switches, "-a", str(model)], cwd=folder, check=True, capture_output=True)
    kind = [] if liveness else ["-DSAFETY"]
    options = [optimise, "-w", "-DNOREDUCE", f"-DMEMLIM={megabytes}", *kind]
    subprocess.run(["gcc", *options, "-o", "pan", "pan.c"], cwd=folder, check=True, capture_output=True)
    flags = [*(["-a", "-f"] if liveness else []), *(["-c0"] if go_on else [])]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command, environment = ["./pan", "-w24", f"-m{depth}", *flags], os.environ | _LARGE_PAGES
    said = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    found = understood(said, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    print(model.stem, " ".join(switches), "|", found)
    return found


def understood(said: str, cpu_seconds: float = 0) -> Search:
    """Read pan's report. Raises `ValueError` if it is not one."""

    def number(pattern: str) -> float:
        found = re.search(pattern, said, flags=re.MULTILINE)
        if found is None:
            raise ValueError(f"no {pattern!r} in {said}")
        return float(found[1])

    errors = int(number(r"errors: (\d+)$"))
    wrong = re.findall(r"^pan:\d+: (?:assertion violated \(*(\w+)|(\w+ cycle|invalid end state))", said, re.MULTILINE)
    return Search(
        complete="Full statespace search for:" in said and not any(words in said for words in _CUT_SHORT),
        errors=errors,
        violated=frozenset(invariant or other for invariant, other in wrong),
        unreached=frozenset(int(line) for line in re.findall(r"\w+\.pml:(\d+), state \d+,", said)),
        states=int(number(r"^ *(\d+) states, stored")),
        depth=int(number(r"depth reached (\d+)")),
        megabytes=number(r"^ *([\d.]+)\ttotal actual memory usage"),
        cpu_seconds=cpu_seconds,
    )
