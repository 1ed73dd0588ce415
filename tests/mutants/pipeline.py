"""Mutants of the pipeline: both claims in their order, the marker, the answers."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    # -- a 2xx is a promise
    Mutant(
        "accepted-before-the-commit",
        "After its budget, a delivery is answered 202 only if the row's COMMIT is known.",
        "Pipeline._answer",
        """if flight.recorded:
    ...""",
        """if not done:
    ...""",
        "integration/test_pipeline.py::test_past_its_budget_nothing_unrecorded_is_promised",
    ),
    Mutant(
        "accepted-without-a-ledger",
        "An event that Postgres cannot record is not answered with a 2xx.",
        "unfinished_work.unavailable",
        "return LEDGER_UNREACHABLE",
        'return outcome.deferred("")',
        "integration/test_pipeline.py::test_while_postgres_is_away_nothing_is_promised[Mode.REFUSE]",
    ),
    Mutant(
        "busy-is-answered-unrecorded",
        "Another delivery's `claimed:` promises nothing: the event is recorded before the answer.",
        "Claims.claim",
        "return await self._record(delivery, self._lock_ttl_seconds, recorded=...)",
        "return outcome.duplicate(delivery.event.id)",
        "integration/test_pipeline.py::test_while_another_is_at_it_the_event_is_recorded",
    ),
    Mutant(
        "unhandled-is-not-recorded",
        "A type without a handler is recorded as `ignored`: a later deploy can replay it.",
        "Pipeline._process",
        """try:
    ...
except BaseException as error:
    ...""",
        """if unwanted:
    return outcome.unhandled(unwanted, 1)
try:
    ...
except BaseException as error:
    ...""",
        "integration/test_pipeline.py::test_a_type_without_a_handler_is_ignored",
    ),
    Mutant(
        "an-internal-error-is-a-2xx",
        "An internal error is not answered with a 2xx.",
        "unfinished_work.unavailable",
        'outcome.unavailable("Internal error")',
        'outcome.deferred("Internal error")',
        "integration/test_pipeline.py::test_a_fault_of_ours_is_a_503",
    ),
    # -- both claims, in this order
    Mutant(
        "busy-dispatches",
        "A delivery that did not get the lock records the event and does not dispatch it.",
        "Claims.claim",
        "return await self._record(delivery, self._lock_ttl_seconds, recorded=...)",
        "return await self._claim(delivery, lock.token)",
        "integration/test_pipeline.py::test_while_another_is_at_it_the_event_is_recorded",
    ),
    Mutant(
        "dispatched-without-redis",
        "While Redis is unreachable a delivery records the event and does not dispatch it.",
        "Claims.claim",
        "return await self._record(delivery, 0, recorded=...)",
        "return await self._claim(delivery, lock.token)",
        "integration/test_pipeline.py::test_while_redis_is_away_events_are_recorded[Mode.REFUSE]",
    ),
    Mutant(
        "due-before-the-lock-has-run-out",
        "An event recorded beside another's lock is due when that lock expires: its holder takes it over.",
        "Claims.claim",
        "self._record(delivery, self._lock_ttl_seconds, recorded=...)",
        "self._record(delivery, 0, recorded=...)",
        "integration/test_pipeline.py::test_while_another_is_at_it_the_event_is_recorded",
    ),
    Mutant(
        "due-later-without-redis",
        "An event recorded while Redis is unreachable is due now.",
        "Claims.claim",
        "self._record(delivery, 0, recorded=...)",
        "self._record(delivery, self._lock_ttl_seconds, recorded=...)",
        "integration/test_pipeline.py::test_while_redis_is_away_events_are_recorded[Mode.REFUSE]",
    ),
    Mutant(
        "a-settled-row-is-deferred",
        "A recorder that finds a row answers by its status: settled, dead or owned is a 200.",
        "Claims._record",
        "isinstance(row, Recorded) or row.status in TAKEABLE",
        "True",
        "integration/test_pipeline.py::test_while_redis_is_away_a_settled_row_answers",
    ),
    Mutant(
        "waiting-is-not-taken-over",
        "The lock holder takes over a row that is `pending` or `failed`.",
        "Claims._claim",
        "isinstance(row, ExistingRow) and row.status in (*TAKEABLE, Status.IGNORED)",
        "False",
        "integration/test_pipeline.py::test_a_delivery_takes_over_what_waits",
    ),
    # -- the marker
    Mutant(
        "marker-before-the-commit",
        "The marker is written once the row's COMMIT is known, never earlier.",
        "Claims._claim",
        "event_id = delivery.event.id",
        """event_id = delivery.event.id
await self._lock.mark_recorded(event_id, token, self._epoch.current)""",
        "integration/test_pipeline.py::test_a_lost_answer_to_the_insert_is_not_a_promise",
    ),
    Mutant(
        "marker-over-a-lost-commit",
        "While the row's COMMIT is unknown, no marker is written.",
        "Claims._claim",
        """try:
    ...
except BaseException:
    ...""",
        """try:
    ...
except BaseException:
    await self._lock.mark_recorded(event_id, token, self._epoch.latest)
    raise""",
        "integration/test_pipeline.py::test_a_lost_answer_to_the_insert_is_not_a_promise",
    ),
    Mutant(
        "lock-kept-over-a-lost-commit",
        "A delivery that cannot continue deletes its lock, so that the next one reaches the ledger.",
        "Claims._claim",
        """try:
    ...
except BaseException:
    ...""",
        "...",
        "integration/test_pipeline.py::test_while_postgres_is_away_nothing_is_promised[Mode.REFUSE]",
    ),
    Mutant(
        "no-marker",
        "A duplicate after completion costs one Redis command and no Postgres statement.",
        "Claims._claim",
        "await self._lock.mark_recorded(event_id, token, row.epoch)",
        "",
        "integration/test_pipeline.py::test_a_duplicate_is_ignored_without_postgres",
    ),
    Mutant(
        "marker-of-the-newest-epoch",
        "The marker carries the epoch read on the connection that committed the row.",
        "Claims._claim",
        "self._lock.mark_recorded(event_id, token, row.epoch)",
        "self._lock.mark_recorded(event_id, token, self._epoch.latest)",
        "integration/test_pipeline.py::test_the_marker_is_of_the_ledger_that_committed_the_row",
    ),
    Mutant(
        "no-marker-no-event",
        "A failed marker write changes nothing.",
        "Lock.mark_recorded",
        'log.debug("marker_not_written", event_id=event_id)',
        "raise",
        "integration/test_pipeline.py::test_a_marker_that_cannot_be_written_changes_nothing",
    ),
    # -- the budget of an answer
    Mutant(
        "budget-ignored",
        "The answer is sent within its budget.",
        "Pipeline._answer",
        "asyncio.wait({work}, timeout=self._budget_seconds)",
        "asyncio.wait({work}, timeout=None)",
        "integration/test_pipeline.py::test_past_its_budget_nothing_unrecorded_is_promised",
    ),
    Mutant(
        "budget-ends-the-work",
        "After the budget the work continues.",
        "Pipeline._answer",
        """if flight.recorded:
    ...""",
        """work.cancel()
if flight.recorded:
    ...""",
        "integration/test_pipeline.py::test_past_its_budget_a_recorded_event_is_deferred",
    ),
    Mutant(
        "work-in-the-requests-task",
        "The work runs in a task of its own: a client that disconnects cancels nothing.",
        "Pipeline._answer",
        "done, _ = await asyncio.wait({work}, timeout=self._budget_seconds)",
        "done = {work} if await work else set()",
        "integration/test_pipeline.py::test_a_client_that_hangs_up_cancels_nothing",
    ),
    # -- copies of an event in one process
    Mutant(
        "a-copy-is-answered-early",
        "A copy of an event that is being recorded gets no 2xx before the event is recorded.",
        "Pipeline._follow",
        "return _NOT_IN_TIME",
        "return outcome.duplicate(delivery.event_id)",
        "integration/test_coalescing.py::test_a_copy_is_promised_nothing_before_the_first_is_recorded",
    ),
    Mutant(
        "a-copy-of-a-lost-record-is-a-2xx",
        "A copy of an event that could not be recorded is a 503 as well.",
        "Pipeline._follow",
        "return LEDGER_UNREACHABLE",
        'return outcome.deferred("")',
        "integration/test_coalescing.py::test_a_copy_of_what_could_not_be_recorded_is_told_so",
    ),
    # -- bodies with an id that are no valid event
    Mutant(
        "a-duplicate-is-parsed",
        "A signed body whose id is recorded is a duplicate, whatever else it holds.",
        "Pipeline.deliver",
        "event_id = delivery.event_id",
        "event_id = delivery.parse().id",
        "integration/test_odd_bodies.py::test_a_recorded_id_is_a_duplicate",
    ),
    Mutant(
        "an-invalid-event-keeps-its-lock",
        "A delivery that is refused gives its lock back.",
        "Claims.check",
        "await self._lock.forget(delivery.event_id, lock.token, None)",
        "",
        "integration/test_odd_bodies.py::test_an_unrecorded_id_is_rejected",
    ),
    Mutant(
        "a-copy-of-an-invalid-event-is-retried",
        "A copy of an event that was refused is refused with the same reason.",
        "Pipeline._follow",
        "delivery.parse()",
        "",
        "integration/test_odd_bodies.py::test_copies_are_rejected_together",
    ),
)
