"""Mutants of the addresses of both stores: TLS, what is refused, and what stops the start."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "a-refused-login-to-redis-passes",
        "A certificate, a login or a database that Redis refuses stops the start: nothing would be dispatched.",
        "_failed",
        'fail("redis", reason)',
        'fail("redis", reason, fatal=False)',
        "integration/test_addresses.py::test_a_login_to_redis_that_is_refused",
    ),
    Mutant(
        "a-missing-right-passes",
        "A right that the lock needs and the user of Redis lacks stops the start.",
        "_inspect_redis",
        "hopeless = _hopeless(error) is not None",
        "hopeless = False",
        "integration/test_preflight.py::test_a_missing_right_is_named[EVAL]",
    ),
    Mutant(
        "a-silent-redis-stops",
        "A silent Redis does not stop the start: events are recorded without it.",
        "_failed",
        'fail("redis", detail, fatal=False)',
        'fail("redis", detail)',
        "integration/test_addresses.py::test_redis_that_is_silent_does_not_stop",
    ),
    Mutant(
        "a-refusal-is-an-outage",
        "A login that Postgres refuses is not waited for, and never called unreachable.",
        "connect.connect",
        "raise refused from failure",
        "raise failure",
        "integration/test_addresses.py::test_a_login_that_is_refused",
    ),
    Mutant(
        "any-name-is-verified",
        "With `verify-full` the name in the server's certificate must be the host's.",
        "_context",
        'context.check_hostname = mode == "verify-full"',
        "context.check_hostname = False",
        "integration/test_addresses.py::test_a_postgres_of_another_name_is_refused",
    ),
    Mutant(
        "tls-is-optional",
        "A mode that requires TLS never continues without it.",
        "tls.attempts",
        'mode == "prefer"',
        'mode != "allow"',
        "integration/test_addresses.py::test_a_postgres_without_tls_is_refused_where_it_is_required",
    ),
    Mutant(
        "the-first-host-has-all-the-time",
        "Of several hosts, one that does not answer leaves time for the next.",
        "connect.connect",
        "remaining / (len(hosts) - position)",
        "remaining",
        "integration/test_addresses.py::test_the_first_host_that_answers",
    ),
    Mutant(
        "any-of-several-hosts-will-do",
        "Of several hosts, one that takes no writes is passed over.",
        "_attributes",
        '"read-write" if hosts > 1 else None',
        "None",
        "integration/test_addresses.py::test_a_standby_is_passed_over",
    ),
)
