"""Follow-ups: with the handler's own COMMIT, once for each, and of every handler of an event."""

from tests.mutants.mutant import Mutant, TextMutant

TESTS = "integration/test_follow_ups.py::"

MUTANTS = (
    TextMutant(
        "a-follow-up-outside-the-transaction",
        "A follow-up is written in the transaction that carries the completion mark, or not at all.",
        "ENQUEUE",
        "pg_current_xact_id()::text = :xid",
        "length(:xid) > 0",
        TESTS + "test_a_handler_that_ends_its_transaction_leaves_no_follow_up",
    ),
    Mutant(
        "a-follow-up-gets-a-random-id",
        "The id of a follow-up is the same in every attempt: a replay writes none twice.",
        "follow_up_id",
        "(parent_id, row_type, str(number))",
        "(parent_id, row_type, str(number), str(object()), __import__('secrets').token_hex(8))",
        TESTS + "test_a_replay_enqueues_nothing_twice",
    ),
    Mutant(
        "a-fan-out-leaves-one-out",
        "An event is completed once the rows of all of its handlers are committed.",
        "Outbox.fan_out",
        "names",
        "list(names)[1:]",
        TESTS + "test_each_of_several_handlers_has_a_row",
    ),
    Mutant(
        "woken-before-the-commit",
        "Recovery is woken once the follow-ups are committed, and never before: it would find nothing.",
        "Dispatcher._attempt",
        "result = await attempt.run()",
        "self.slots.wake()\nresult = await attempt.run()",
        TESTS + "test_recovery_is_woken_after_the_commit[now]",
    ),
    Mutant(
        "a-follow-up-wakes-nobody",
        "A follow-up that is due at once does not wait for the next round of recovery.",
        "Dispatcher._attempt",
        "self.slots.wake()",
        "pass",
        TESTS + "test_recovery_is_woken_after_the_commit[now]",
    ),
    Mutant(
        "the-handlers-fail-for-the-ledger",
        "If the rows of the handlers cannot be written, the ledger has failed, and none of the handlers.",
        "Attempt._complete",
        "return CommitUnknown(action, describe(error), transaction)",
        "raise",
        TESTS + "test_rows_that_the_ledger_does_not_take",
    ),
    Mutant(
        "an-unknown-task-is-enqueued",
        "The recorder of an unfinished row wants it: a name that no task of this process has is refused.",
        "Outbox._check_open",
        "self._tasks is not None and name not in self._tasks",
        "False",
        TESTS + "test_a_name_without_a_task_is_refused",
    ),
    Mutant(
        "a-star-takes-follow-ups",
        "A handler for `*` gets events, and no row of a task or of another handler.",
        "Registry.find",
        "is_follow_up(event_type)",
        "False",
        TESTS + "test_a_build_without_the_task_leaves_its_rows_alone",
    ),
    Mutant(
        "a-savepoint-keeps-its-follow-ups",
        "What was enqueued in a savepoint is forgotten when it is rolled back.",
        "HandlerRules.note_executed",
        "kept < enqueued",
        "False",
        TESTS + "test_a_rolled_back_savepoint_forgets_its_follow_ups",
    ),
    Mutant(
        "a-context-outlives-its-handler",
        "Once a handler has ended, its context enqueues nothing.",
        "calls._within_its_rules",
        "outbox.close()",
        "pass",
        TESTS + "test_after_the_handler_has_ended_nothing_is_enqueued",
    ),
    Mutant(
        "handlers-share-a-parent",
        "Two handlers of an event that enqueue the same task have a follow-up each.",
        "SingleAttempt._work",
        "Outbox(self.tasks, {self.event.id: self.claim.event_id})",
        "Outbox(self.tasks, {})",
        TESTS + "test_one_of_several_handlers_enqueues",
    ),
)
