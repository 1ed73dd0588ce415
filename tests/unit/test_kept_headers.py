"""The headers of a first delivery that the ledger keeps."""

from firstclaim.inbox.kept_headers import kept_headers
from tests.fixtures import signed

USER_AGENT = (b"user-agent", b"Stripe/1.0 (+https://stripe.com/docs/webhooks)")


def test_what_an_operator_asks_for_is_kept_and_nothing_else() -> None:
    """The user agent, what is Stripe's, what counts attempts; no cookie, no authorization, no address."""
    headers = [
        (b"host", b"pay.example.com"),
        USER_AGENT,
        (b"authorization", b"Basic c2VjcmV0"),
        (b"cookie", b"session=1"),
        (b"stripe-version", b"2026-10-29"),
        (b"x-delivery-attempt", b"2"),
        (b"x-forwarded-for", b"203.0.113.9"),
    ]
    assert kept_headers(headers) == (
        "user-agent: Stripe/1.0 (+https://stripe.com/docs/webhooks)\nstripe-version: 2026-10-29\nx-delivery-attempt: 2"
    )
    assert kept_headers(headers[:1]) is None


def test_of_a_signature_only_its_time_is_kept() -> None:
    """Whichever header it is in, and however it is spaced."""
    value = signed(b"{}", at=1_700_000_000)["Stripe-Signature"].encode()
    assert kept_headers([(b"stripe-signature", value)]) == "stripe-signature: t=1700000000"
    assert kept_headers([(b"x-stripe-signature", b"v1=abc, t=17 ,v0=def")]) == "x-stripe-signature:  t=17 "
    assert kept_headers([(b"stripe-signature", b"abcdef")]) == "stripe-signature: "


def test_a_header_can_hold_anything() -> None:
    """The text is short, printable and without NUL, which Postgres refuses."""
    kept = kept_headers([(b"user-agent", b"\0\x1b[31m\xff\x85" + b"a" * 10_000), *[(b"stripe-a", b"1")] * 50])
    assert kept is not None
    assert kept.split("\n")[0] == "user-agent: ??[31m\xff?" + "a" * 192
    assert len(kept.split("\n")) == 10
