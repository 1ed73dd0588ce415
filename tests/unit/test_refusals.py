"""What the log says of refused requests."""

import itertools

from structlog.testing import capture_logs

from firstclaim.errors import Rejected
from firstclaim.web.refusals import RefusalLog


def test_what_may_be_stripes_is_a_warning_now_and_then() -> None:
    """The first refusal of a kind is a warning at once; those within ten seconds are counted in the next one."""
    clock = itertools.count(100.0, 4.0)
    refusals = RefusalLog(lambda: next(clock))
    with capture_logs() as lines:
        for _ in range(4):
            refusals.note(Rejected("signature_mismatch", "no"))
        refusals.note(Rejected("signature_stale", "no"))
        refusals.note(Rejected("signature_missing", "no"))
    assert [line["kind"] for line in lines if line["event"] == "rejected"] == [
        *["signature_mismatch"] * 4,
        "signature_stale",
        "signature_missing",
    ]
    warnings = [line for line in lines if line["event"] == "signatures_refused"]
    assert [(line["kind"], line["requests"], line["log_level"]) for line in warnings] == [
        ("signature_mismatch", 1, "warning"),
        ("signature_mismatch", 3, "warning"),
        ("signature_stale", 1, "warning"),
    ]
