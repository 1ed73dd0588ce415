"""Mutants of forwarding, and of the pauses that handlers ask for."""

from tests.mutants.mutant import Mutant

FORWARD = "integration/test_forward.py::"

MUTANTS = (
    Mutant(
        "the-breaker-drops",
        "An event that the breaker turns away is not completed: it waits, and is tried again.",
        "Forwarder.forward",
        "if not isinstance(request, Request):\n    ...",
        "if not isinstance(request, Request):\n    return ACTION",
        FORWARD + "test_an_outage_costs_a_few_requests",
    ),
    Mutant(
        "the-breaker-never-opens",
        "After five failures in a row a target is left alone.",
        "Breaker.is_open",
        "self._failures >= _FAILURES",
        "False",
        FORWARD + "test_an_outage_costs_a_few_requests",
    ),
    Mutant(
        "an-interrupted-probe-is-the-last",
        "After a probe that was interrupted the next request is let through.",
        "Breaker.note",
        "if own:\n    self._probe = None",
        "if own and result is not Result.UNKNOWN:\n    self._probe = None",
        "unit/test_forward.py::test_a_probe_that_is_interrupted_is_followed_by_another",
    ),
    Mutant(
        "gone-is-completed",
        "A target that answers 410 has not taken the event.",
        "Forwarder._taken",
        "200 <= status < 300",
        "200 <= status < 300 or status == 410",
        FORWARD + "test_a_target_that_is_gone_pauses_its_type",
    ),
    Mutant(
        "gone-is-tried-again",
        "After a 410 the type is paused.",
        "Dispatcher._settle_failed",
        "await pause_for_handler(self.ledger, claim, handler.name)",
        "False",
        FORWARD + "test_a_target_that_is_gone_pauses_its_type",
    ),
    Mutant(
        "forwarded-unsigned",
        "A forwarded event is signed with the target's secret.",
        "Forwarder._post",
        "_HEADERS | headers",
        "_HEADERS | {'webhook-id': event_id}",
        FORWARD + "test_the_signed_bytes_arrive",
    ),
    Mutant(
        "forwarded-as-new-json",
        "A target gets the bytes that Stripe has signed.",
        "forward._forwarding",
        "context.body",
        "context.body + b' '",
        FORWARD + "test_the_signed_bytes_arrive",
    ),
    Mutant(
        "redirects-are-followed",
        "A redirect is not followed: it is no success.",
        "Forwarder._post",
        "client.send(request, stream=True, follow_redirects=False)",
        "client.send(request, stream=True, follow_redirects=True)",
        FORWARD + "test_what_is_no_success[redirect]",
    ),
    Mutant(
        "a-body-has-more-time",
        "A target's time limit is that of the head and the body of its answer.",
        "_beginning",
        "min(ends_at, asyncio.get_running_loop().time() + _DRAIN_SECONDS)",
        "asyncio.get_running_loop().time() + _DRAIN_SECONDS",
        FORWARD + "test_a_body_that_stalls_ends_at_the_time_limit[200-processed]",
    ),
    Mutant(
        "retry-after-is-ignored",
        "A pause that a target asks for is kept.",
        "Forwarder._try",
        "answer.retry_after if answer.status in (429, 503) else None",
        "None",
        FORWARD + "test_a_pause_that_a_target_asks_for[429]",
    ),
    Mutant(
        "a-target-takes-what-it-is-given",
        "A target gets no more requests at once than its limit.",
        "forward._slots",
        "target.concurrency if target.concurrency < settings.handler_slots else None",
        "None",
        FORWARD + "test_no_more_at_once_than_it_is_asked_for",
    ),
)
