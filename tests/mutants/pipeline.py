"""Mutants of the path: both claims in their order, the marker, the answers."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    # -- nothing is promised that is not so
    Mutant(
        "promised-before-the-commit",
        "Past its budget an answer is 202 only if the row's COMMIT is known.",
        "inbox/pipeline.py",
        "if progress.recorded:",
        "if not done:",
        "integration/test_pipeline.py::test_past_its_budget_nothing_unrecorded_is_promised",
    ),
    Mutant(
        "promised-without-a-ledger",
        "What Postgres cannot record is not promised.",
        "inbox/pipeline.py",
        'event_id=event.id, error=str(error))\n            return outcome.unavailable("The ledger cannot be reached")',
        'event_id=event.id, error=str(error))\n            return outcome.deferred("")',
        "integration/test_pipeline.py::test_while_postgres_is_away_nothing_is_promised[Mode.REFUSE]",
    ),
    Mutant(
        "busy-is-answered-unrecorded",
        "Another's `claimed:` is no promise: record, then answer.",
        "inbox/claims.py",
        "if reply is LockReply.BUSY:",
        "if reply is LockReply.BUSY:\n            return outcome.duplicate(event_id)\n        if False:",
        "integration/test_pipeline.py::test_while_another_is_at_it_the_event_is_recorded",
    ),
    Mutant(
        "unhandled-is-not-recorded",
        "A type without a handler is recorded as `ignored`: a later deploy can replay it.",
        "inbox/pipeline.py",
        "                won = await self._claims.win(",
        "                if reason := self._why_ignored(event):\n"
        "                    return outcome.unhandled(reason, 1)\n"
        "                won = await self._claims.win(",
        "integration/test_pipeline.py::test_a_type_without_a_handler_is_ignored",
    ),
    Mutant(
        "a-fault-of-ours-is-a-2xx",
        "Whatever breaks on the way, nothing is promised.",
        "inbox/pipeline.py",
        'log.exception("delivery_broke", event_id=event.id, error=describe_error(error))\n'
        '            return outcome.unavailable("Internal error")',
        'log.exception("delivery_broke", event_id=event.id, error=describe_error(error))\n'
        '            return outcome.deferred("Internal error")',
        "integration/test_pipeline.py::test_a_fault_of_ours_is_a_503",
    ),
    # -- both claims, in this order
    Mutant(
        "busy-dispatches",
        "Who did not get the lock records, and dispatches nothing.",
        "inbox/claims.py",
        "if reply is LockReply.BUSY:",
        "if False:",
        "integration/test_pipeline.py::test_while_another_is_at_it_the_event_is_recorded",
    ),
    Mutant(
        "away-dispatches",
        "While Redis is away a delivery records, and dispatches nothing.",
        "inbox/claims.py",
        "if reply is LockReply.AWAY:\n            return",
        "if False:\n            return",
        "integration/test_pipeline.py::test_while_redis_is_away_events_are_recorded[Mode.REFUSE]",
    ),
    Mutant(
        "due-before-the-lock-has-run-out",
        "What was recorded beside another's lock is due when that has run out: its holder takes it over.",
        "inbox/claims.py",
        "due_in_seconds=self.lock_ttl_seconds",
        "due_in_seconds=0",
        "integration/test_pipeline.py::test_while_another_is_at_it_the_event_is_recorded",
    ),
    Mutant(
        "due-later-though-redis-is-away",
        "What was recorded while Redis was away is due now.",
        "inbox/claims.py",
        "due_in_seconds=0,",
        "due_in_seconds=self.lock_ttl_seconds,",
        "integration/test_pipeline.py::test_while_redis_is_away_events_are_recorded[Mode.REFUSE]",
    ),
    Mutant(
        "a-settled-row-is-deferred",
        "A recorder that finds a row answers by it: settled, dead or owned is a 200.",
        "inbox/claims.py",
        "if found is None or found.status in TAKEABLE:\n            return otherwise",
        "if True:\n            return otherwise",
        "integration/test_pipeline.py::test_while_redis_is_away_a_settled_row_answers",
    ),
    Mutant(
        "waiting-is-not-taken-over",
        "The lock holder takes over a row that waits.",
        "inbox/claims.py",
        "if isinstance(won, ExistingRow) and won.status in TAKEABLE:",
        "if False:",
        "integration/test_pipeline.py::test_a_delivery_takes_over_what_waits",
    ),
    # -- the marker
    Mutant(
        "marker-before-the-commit",
        "The marker is written once the row's COMMIT is known, never earlier.",
        "inbox/claims.py",
        "        won = await self.ledger.claim(",
        "        await self.lock.mark_recorded(event_id, token, self.epoch.current)\n"
        "        won = await self.ledger.claim(",
        "integration/test_pipeline.py::test_a_lost_answer_to_the_insert_is_not_a_promise",
    ),
    Mutant(
        "marker-over-a-lost-commit",
        "When the row's COMMIT is not known there is no marker.",
        "inbox/claims.py",
        "            # The next delivery must reach the ledger: whether this row exists is not known.\n"
        "            await self.lock.forget(event_id, token, None)",
        "            await self.lock.mark_recorded(event_id, token, self.epoch.latest)",
        "integration/test_pipeline.py::test_a_lost_answer_to_the_insert_is_not_a_promise",
    ),
    Mutant(
        "lock-kept-over-a-lost-commit",
        "When we cannot go on our lock is deleted: the next delivery reaches the ledger.",
        "inbox/claims.py",
        "            # The next delivery must reach the ledger: whether this row exists is not known.\n"
        "            await self.lock.forget(event_id, token, None)",
        "            pass",
        "integration/test_pipeline.py::test_while_postgres_is_away_nothing_is_promised[Mode.REFUSE]",
    ),
    Mutant(
        "no-marker",
        "A duplicate after completion costs one command of Redis and no statement of Postgres.",
        "inbox/claims.py",
        "        await self.lock.mark_recorded(event_id, token, won.epoch)\n",
        "",
        "integration/test_pipeline.py::test_a_duplicate_is_ignored_without_postgres",
    ),
    Mutant(
        "marker-of-the-newest-epoch",
        "The marker carries the epoch read on the connection that committed the row.",
        "inbox/claims.py",
        "mark_recorded(event_id, token, won.epoch)",
        "mark_recorded(event_id, token, self.epoch.latest)",
        "integration/test_pipeline.py::test_the_marker_is_of_the_ledger_that_committed_the_row",
    ),
    Mutant(
        "no-marker-no-event",
        "A failed marker write changes nothing.",
        "inbox/lock.py",
        '            log.debug("marker_not_written", event_id=event_id)',
        "            raise",
        "integration/test_pipeline.py::test_a_marker_that_cannot_be_written_changes_nothing",
    ),
    # -- the answer's time
    Mutant(
        "budget-ignored",
        "The answer comes within its budget.",
        "inbox/pipeline.py",
        "{task}, timeout=self._budget_seconds",
        "{task}, timeout=None",
        "integration/test_pipeline.py::test_past_its_budget_nothing_unrecorded_is_promised",
    ),
    Mutant(
        "budget-ends-the-work",
        "Past the budget the work goes on.",
        "inbox/pipeline.py",
        "        if progress.recorded:\n",
        "        task.cancel()\n        if progress.recorded:\n",
        "integration/test_pipeline.py::test_past_its_budget_a_recorded_event_is_deferred",
    ),
    Mutant(
        "work-in-the-requests-task",
        "The work is not the request's: a client that hangs up cancels nothing.",
        "inbox/pipeline.py",
        "done, _ = await asyncio.wait({task}, timeout=self._budget_seconds)",
        "done = {task} if await task else set()",
        "integration/test_pipeline.py::test_a_client_that_hangs_up_cancels_nothing",
    ),
    # -- copies in one process
    Mutant(
        "a-copy-is-answered-early",
        "A copy of what is being recorded is promised nothing before that is.",
        "inbox/pipeline.py",
        '        if not done:\n            return outcome.unavailable("Not recorded in time")\n        if first',
        "        if not done:\n            return outcome.duplicate(event_id)\n        if first",
        "integration/test_coalescing.py::test_a_copy_is_promised_nothing_before_the_first_is_recorded",
    ),
    Mutant(
        "a-copy-of-a-lost-record-is-a-2xx",
        "A copy of what could not be recorded is a 503 as well.",
        "inbox/pipeline.py",
        "        if first.exception() is not None:\n            return outcome.unavailable(",
        "        if first.exception() is not None:\n            return outcome.deferred(",
        "integration/test_coalescing.py::test_a_copy_of_what_could_not_be_recorded_is_told_so",
    ),
)
