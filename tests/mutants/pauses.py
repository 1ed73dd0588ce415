"""Mutants of the pauses."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "a-paused-delivery-is-dispatched",
        "A delivery of a paused type is recorded and not dispatched.",
        "Pipeline._process",
        "self._pauses.cover(event.type)",
        "False",
        "integration/test_pauses.py::test_a_paused_event_waits_and_is_dispatched_once_it_is_resumed[invoice.paid]",
    ),
    Mutant(
        "recovery-takes-what-is-paused",
        "Recovery leaves the events of a paused type alone.",
        "Backlog._unpaused",
        "self._pauses.cover(queue[0])",
        "False",
        "integration/test_pauses.py::test_a_paused_event_waits_and_is_dispatched_once_it_is_resumed[invoice.paid]",
    ),
    Mutant(
        "what-is-paused-is-unwanted",
        "An event is not given up because its type is paused.",
        "Backlog.give_up_unwanted",
        "not self._wants(*queue)",
        "not self._wants(*queue) or self._pauses.cover(queue[0])",
        "integration/test_pauses.py::test_a_paused_event_is_not_given_up",
    ),
    Mutant(
        "resumed-past-its-time",
        "An event that has waited for its type has its whole time to give up again.",
        "operations.pauses.resume",
        "operations.fetch(_PROLONG, until=row['until'], types=types, limit=BATCH)",
        "operations.fetch(_PROLONG, until=row['until'], types=types, limit=0)",
        "integration/test_pauses.py::test_a_paused_event_is_not_given_up",
    ),
    Mutant(
        "paused-after-the-first-deliveries",
        "A process that starts knows what is paused before its first delivery.",
        "Components.running",
        "await self.pipeline.start()",
        "",
        "integration/test_pauses.py::test_a_process_knows_the_pauses_before_its_first_delivery",
    ),
    Mutant(
        "a-pause-is-read-once",
        "A running process learns of a pause with its next round of recovery.",
        "Recovery._round",
        "self._pipeline.pause(survey)",
        "",
        "integration/test_pauses.py::test_a_round_of_recovery_learns_of_a_pause",
    ),
)
