"""All mutants, in the order of README.md."""

from tests.mutants import dispatch, door, guards, ledger, lock, pipeline, recovery, stores

PARTS = (pipeline, lock, ledger, guards, dispatch, recovery, stores, door)
MUTANTS = tuple(mutant for part in PARTS for mutant in part.MUTANTS)
