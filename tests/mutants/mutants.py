"""All mutants, in the order of README.md."""

from tests.mutants import dispatch, guards, ledger, lock, pipeline, protocol, recovery, stores

PARTS = (pipeline, lock, ledger, guards, dispatch, recovery, stores, protocol)
MUTANTS = tuple(mutant for part in PARTS for mutant in part.MUTANTS)
