"""Mutants of the rules for groups of failures and for notices."""

from tests.mutants.mutant import Mutant, TextMutant

GROUPS = "integration/test_failure_groups.py::"
TESTS = "integration/test_notify.py::"

MUTANTS = (
    TextMutant(
        "a-requested-retry-is-a-failure",
        "A retry that a handler asked for belongs to no group, unless the event is dead of it.",
        "statements.FAILURE",
        "CASE WHEN status = 'dead' OR NOT CAST(:requested AS bool) THEN",
        "CASE WHEN status = 'dead' OR CAST(:requested AS bool) IS NOT NULL THEN",
        GROUPS + "test_a_retry_that_was_asked_for_is_no_failure",
    ),
    TextMutant(
        "an-event-stays-in-each-group",
        "An event is in the group of its last failure, and in no other.",
        "IN_GROUP",
        "(later.attempt, later.ended_at) > (a.attempt, a.ended_at)",
        "later.attempt < a.attempt AND later.attempt > a.attempt",
        GROUPS + "test_an_event_is_in_the_group_of_its_last_failure",
    ),
    TextMutant(
        "a-dead-event-is-counted-again",
        "Each dead event is counted in one notice.",
        "GATHER_DEAD",
        "SET last_at = (SELECT max(ended_at) FROM dead)",
        "SET last_at = last_at",
        TESTS + "test_dead_events_are_told_once_for_their_group",
    ),
    TextMutant(
        "what-follows-is-told-at-once",
        "After a notice, nothing is sent of its subject for a while: what follows is counted.",
        "statements.SENT",
        "make_interval(secs => :quiet)",
        "make_interval(secs => 0 * :quiet)",
        TESTS + "test_what_follows_is_counted_and_told_after_the_quiet",
    ),
    TextMutant(
        "each-try-has-an-id-of-its-own",
        "A notice has the same id at each try, whichever process sends it.",
        "TAKE",
        "coalesce(notice_id, gen_random_uuid())",
        "coalesce(gen_random_uuid(), notice_id)",
        TESTS + "test_a_process_that_vanishes_while_it_sends_loses_nothing",
    ),
    TextMutant(
        "what-is-sent-changes-between-tries",
        "Under one id the same is sent at each try: what happens meanwhile is in the next notice.",
        "TAKE",
        "events = CASE WHEN content IS NULL THEN 0 ELSE events END",
        "events = 0",
        TESTS + "test_what_the_receiver_does_not_take_is_sent_again[refused]",
    ),
    TextMutant(
        "dead-events-go-before-all-else",
        "Notices of each topic take turns: many groups of dead events delay no other notice.",
        "TAKE",
        "array_position(CAST(:topics AS text[]), topic), due_at",
        "array_position(CAST(:topics AS text[]), NULL), due_at",
        TESTS + "test_topics_take_turns",
    ),
    Mutant(
        "a-notice-that-was-not-taken-is-forgotten",
        "A notice is kept until the receiver has taken it.",
        "Notifier.send_next",
        "reason is None",
        "True",
        TESTS + "test_what_the_receiver_does_not_take_is_sent_again[refused]",
    ),
    Mutant(
        "an-unreachable-receiver-is-tried-for-each-notice",
        "A receiver that is unreachable gets one request per backoff.",
        "Notifier.send_next",
        "full or now < self._resume_at",
        "full",
        TESTS + "test_an_unreachable_receiver_does_not_fill_the_ledger",
    ),
    TextMutant(
        "recovered-while-its-events-wait",
        "A handler has recovered once the events that failed are settled, not once a look does not find them.",
        "RECOVERS",
        "AND NOT ended.unsettled",
        "AND (NOT ended.unsettled OR ended.unsettled)",
        TESTS + "test_a_handler_whose_events_are_behind_a_backlog_has_not_recovered",
    ),
    Mutant(
        "a-refusal-is-forgotten-with-the-ledger",
        "Refused requests are reported later if Postgres is unreachable.",
        "Notifier.gather",
        "for reason, (requests, endpoints) in list(self._unwritten.items()): ...",
        "taken, self._unwritten = self._unwritten, {}\nfor reason, (requests, endpoints) in taken.items():\n    "
        "await self._ledger.run(statements.REFUSED, reason=reason, requests=requests, endpoints=sorted(endpoints))",
        TESTS + "test_a_refusal_that_the_ledger_could_not_take_is_told_later",
    ),
)
