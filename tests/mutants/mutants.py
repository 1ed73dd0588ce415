"""All mutants, by the headings of README.md and in its order."""

from tests.mutants import (
    addresses,
    batches,
    builds,
    capacity,
    dispatch,
    guards,
    ledger,
    lock,
    pipeline,
    postgres,
    recovery,
    stalled,
    web,
)

SECTIONS = {
    "Both claims, and the answer": pipeline.MUTANTS,
    "Builds with different handlers": builds.MUTANTS,
    "Places, hung threads, the head of the queue": capacity.MUTANTS,
    "The lock": lock.MUTANTS,
    "The ledger: claim, record, take over": ledger.MUTANTS,
    "The ledger: changes of state": guards.MUTANTS,
    "Dispatch": dispatch.MUTANTS,
    "Batch handlers": batches.MUTANTS,
    "Recovery and shutdown": recovery.MUTANTS,
    "Postgres": postgres.MUTANTS,
    "A Postgres that stalls": stalled.MUTANTS,
    "Addresses": addresses.MUTANTS,
    "Requests and responses": web.MUTANTS,
}
MUTANTS = tuple(mutant for section in SECTIONS.values() for mutant in section)
