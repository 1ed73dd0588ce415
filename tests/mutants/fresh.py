"""Mutants of fresh objects."""

from tests.mutants.mutant import Mutant

FRESH = "integration/test_fresh.py::"

MUTANTS = (
    Mutant(
        "the-snapshot-is-handed-out",
        "A handler with `fresh=True` gets the object as it is now.",
        "with_fresh_object",
        "event.with_object(await fetch(event))",
        "event.with_object(event.data['object'] if await fetch(event) else {})",
        FRESH + "test_the_handler_gets_the_object_as_it_is_now",
    ),
    Mutant(
        "the-snapshot-is-lost",
        "`context.snapshot` is the object as the event has it.",
        "Context.snapshot",
        "self.event.payload.get('data')",
        "self.event.data",
        FRESH + "test_the_handler_gets_the_object_as_it_is_now",
    ),
    Mutant(
        "fetched-without-a-limit",
        "A fetch ends within its time limit, which is a share of the lease.",
        "with_fresh_object",
        "asyncio.timeout(timeout_seconds)",
        "asyncio.timeout(timeout_seconds + 30)",
        FRESH + "test_a_time_limit_of_its_own",
    ),
    Mutant(
        "a-limit-beyond-the-lease",
        "A time limit above a quarter of the lease is refused.",
        "stripe_objects.faults",
        "settings.fresh_timeout_seconds * _LEASE_SHARE > settings.lease_seconds",
        "False",
        FRESH + "test_what_a_start_refuses",
    ),
    Mutant(
        "the-fetch-is-free",
        "The time of a fetch counts against the handler's deadline.",
        "Dispatcher._attempt",
        "self.limits.deadline_of(handler) - spent_seconds",
        "self.limits.deadline_seconds",
        FRESH + "test_nothing_is_locked_while_stripe_is_waited_for",
    ),
    Mutant(
        "begun-before-the-fetch",
        "While the object is fetched, the attempt has not begun: a crash releases the event without a charge.",
        "Dispatcher._attempt_fresh",
        "began = loop.time()",
        "began = loop.time()\nself._waiting.pop((claim.event_id, claim.attempt), None)",
        FRESH + "test_nothing_is_locked_while_stripe_is_waited_for",
    ),
    Mutant(
        "a-pause-is-charged",
        "An event that waits because Stripe asks for a pause is not charged.",
        "with_fresh_object",
        "return Postponed(retry)",
        "error = retry",
        FRESH + "test_a_pause_that_stripe_asks_for",
    ),
    Mutant(
        "a-pause-is-of-one-event",
        "While Stripe asks for a pause, no request is sent for another event either.",
        "StripeObjects._check_pause",
        "left > 0",
        "False",
        FRESH + "test_a_pause_that_stripe_asks_for",
    ),
    Mutant(
        "any-key-will-do",
        "A request has the key of the event's own endpoint and mode, or is not made.",
        "StripeObjects._key",
        "self._keys.get((event.endpoint, None))",
        "next(iter(self._keys.values()))",
        FRESH + "test_the_key_is_of_the_endpoint_and_the_mode[eu-False-None]",
    ),
    Mutant(
        "asked-in-the-platforms-account",
        "The object of a connected account is fetched in that account.",
        "StripeObjects.fetch",
        "('stripe_account', event.account)",
        "('stripe_account', None)",
        FRESH + "test_the_handler_gets_the_object_as_it_is_now",
    ),
    Mutant(
        "a-thin-event-names-any-address",
        "A thin event can name a path of Stripe's API, and nothing else.",
        "stripe_objects._path",
        "not _RELATED_PATH.fullmatch(path)",
        "False",
        FRESH + "test_a_thin_event_without_a_usable_url[/v1/../v1/events]",
    ),
)
