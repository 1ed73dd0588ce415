"""The signature check, with stripe-python's own generator and verifier as the oracle."""

import hashlib
import hmac
import time
from collections.abc import Sequence

import pytest
import stripe

from firstclaim.errors import Rejected
from firstclaim.web.signature import verify

NOW = 1_793_610_041
BODY = b'{"id":"evt_1","object":"event"}'
SECRET, OTHER = "whsec_one", "whsec_two"


def header(secret: str = SECRET, body: bytes = BODY, at: int = NOW) -> str:
    """What Stripe's own library sends for `body`."""
    return str(stripe.WebhookSignature.generate_signature_header(body.decode(), secret, at))


def v1(secret: str = SECRET, body: bytes = BODY, at: int = NOW) -> str:
    return header(secret, body, at).partition(",")[2]


def refusal(
    headers: Sequence[str], body: bytes = BODY, secrets: Sequence[str] = (SECRET,), now: float = NOW
) -> str | None:
    """The kind of refusal, or None for accepted; any other exception fails the test."""
    try:
        verify(body, headers, secrets, tolerance_seconds=300, now=now)
    except Rejected as error:
        refused = error
    else:
        return None
    assert refused.status == 400
    assert refused.reason == "Signature is missing, malformed, outside the tolerance, or does not match"
    return refused.kind


# -- accepted -----------------------------------------------------------------------------------------


def test_what_stripe_signs_is_accepted() -> None:
    """A header made by stripe-python with our secret passes."""
    assert refusal([header()]) is None


def test_any_of_our_secrets_will_do() -> None:
    """While a secret is rolled two are configured, in any order, and either may have signed."""
    assert refusal([header(OTHER)], secrets=(SECRET, OTHER)) is None
    assert refusal([header(SECRET)], secrets=(SECRET, OTHER)) is None


def test_any_of_several_signatures_will_do() -> None:
    """While a secret is rolled Stripe sends one `v1` per secret; the one that is ours may be anywhere."""
    for items in ([v1(), v1(OTHER)], [v1(OTHER), v1()], [v1("x"), v1("y"), v1()]):
        assert refusal([",".join([f"t={NOW}", *items])]) is None


def test_other_schemes_are_passed_over() -> None:
    """`v0` and what may come after `v1` neither help nor hurt."""
    assert refusal([f"t={NOW},v0=dead,{v1()},v2=beef"]) is None
    assert refusal([f"{v1()},t={NOW}"]) is None


@pytest.mark.parametrize("away", [-300, 0, 300])
def test_the_tolerance_is_two_sided_and_inclusive(away: int) -> None:
    """Exactly 300 s in either direction is within the tolerance."""
    assert refusal([header()], now=NOW + away) is None


def test_a_body_beyond_ascii_is_verified_as_bytes() -> None:
    """Names in a payload are UTF-8, and a BOM or a NUL is a byte like any other here."""
    for body in ("{'name':'Zoë \N{EURO SIGN}'}".encode(), b"\xef\xbb\xbf{}", b"\0", b""):
        assert refusal([header(body=body)], body) is None


# -- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ([], "signature_missing"),
        ([header(), header()], "signature_repeated"),
        ([header("whsec_wrong"), header()], "signature_repeated"),
        ([""], "signature_malformed"),
        (["t"], "signature_malformed"),
        ([f"t={NOW}"], "signature_mismatch"),
        ([v1()], "signature_malformed"),
        ([f"t={NOW},v0={v1()[3:]}"], "signature_mismatch"),
        ([f"t={NOW},v1="], "signature_mismatch"),
        ([f"t={NOW},v1={'0' * 64}"], "signature_mismatch"),
        ([f"t={NOW},{v1()[:-1]}"], "signature_mismatch"),
        ([f"t={NOW},{v1()}0"], "signature_mismatch"),
        ([f"t={NOW},{v1().upper()}"], "signature_mismatch"),
        ([f"t={NOW + 1},{v1()}"], "signature_mismatch"),
        ([f"t={NOW},V1={v1()[3:]}"], "signature_mismatch"),
        ([f"t={NOW},{v1()},"], "signature_malformed"),
        ([f"t={NOW},t={NOW},{v1()}"], "signature_malformed"),
        ([f"t={NOW},t={NOW - 9999},{v1()}"], "signature_malformed"),
        ([f"T={NOW},{v1()}"], "signature_malformed"),
        ([f"t=,{v1()}"], "signature_malformed"),
        ([f"t=now,{v1()}"], "signature_malformed"),
        ([f"t=+{NOW},{v1()}"], "signature_malformed"),
        ([f"t=-{NOW},{v1()}"], "signature_malformed"),
        ([f"t= {NOW},{v1()}"], "signature_malformed"),
        ([f"t={NOW}.0,{v1()}"], "signature_malformed"),
        ([f"t={NOW}=1,{v1()}"], "signature_malformed"),
        ([f"t=1_793_610_041,{v1()}"], "signature_malformed"),
        ([f"t={'9' * 13},{v1()}"], "signature_malformed"),
        ([f"t={'9' * 5000},{v1()}"], "signature_malformed"),
        ([f"t={'9' * 12},{v1()}"], "signature_stale"),
        (["t=\N{SUPERSCRIPT TWO},v1=00"], "signature_malformed"),
        ([f"t={NOW},v1=\N{LATIN SMALL LETTER E WITH ACUTE}"], "signature_malformed"),
        ([f"t={NOW},{v1()},v0=\xff"], "signature_malformed"),
        ([f"t={NOW},v1=\ud800"], "signature_malformed"),
    ],
)
def test_a_bad_header_is_refused(headers: list[str], kind: str) -> None:
    """Missing, repeated, malformed, mismatching: always a 400, never an exception of stripe-python's."""
    assert refusal(headers) == kind


@pytest.mark.parametrize("away", [-301, 301, -(10**9), 10**9])
def test_stale_and_future_are_refused(away: int) -> None:
    """A timestamp beyond the tolerance is refused on both sides; stripe-python lets the future pass."""
    assert refusal([header()], now=NOW + away) == "signature_stale"


def test_stripe_itself_would_take_the_future() -> None:
    """The trap that our own check is for: when this fails, stripe-python has become two-sided too."""
    ahead = int(time.time()) + 10**6
    assert stripe.WebhookSignature.verify_header(BODY.decode(), header(at=ahead), SECRET, tolerance=300)
    assert refusal([header(at=ahead)], now=time.time()) == "signature_stale"


def test_another_secret_is_refused() -> None:
    """Signed, by someone else."""
    assert refusal([header("whsec_wrong")], secrets=(SECRET, OTHER)) == "signature_mismatch"


def test_nobody_signs_without_a_secret() -> None:
    """No secret, or a blank one, verifies nothing, not even what was signed with it."""
    blank = hmac.new(b"", b"%d.%b" % (NOW, BODY), hashlib.sha256).hexdigest()
    assert refusal([f"t={NOW},v1={blank}"], secrets=()) == "signature_mismatch"
    assert refusal([f"t={NOW},v1={blank}"], secrets=("",)) == "signature_mismatch"


@pytest.mark.parametrize("body", [BODY + b" ", BODY[:-1], b"", BODY.replace(b"evt_1", b"evt_2")])
def test_a_changed_body_is_refused(body: bytes) -> None:
    """Not one byte of the body may differ from what was signed."""
    assert refusal([header()], body) == "signature_mismatch"


@pytest.mark.parametrize("body", [b"\xff", b"\xed\xa0\x80", BODY + b"\xc0"])
def test_a_body_that_is_not_utf8_is_refused(body: bytes) -> None:
    """Bytes that Stripe cannot have sent are a 400, even under a digest that is right."""
    digest = hmac.new(SECRET.encode(), b"%d.%b" % (NOW, body), hashlib.sha256).hexdigest()
    assert refusal([f"t={NOW},v1={digest}"], body) == "body_not_utf8"


def test_ten_thousand_signatures_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 10,000 signatures is refused before one digest is computed, though one of them is right."""
    computed: list[str] = []
    right = v1()
    compute = stripe.WebhookSignature._compute_signature

    def counted(payload: str, secret: str) -> str:
        computed.append(payload)
        return compute(payload, secret)

    monkeypatch.setattr(stripe.WebhookSignature, "_compute_signature", staticmethod(counted))
    assert refusal([",".join([f"t={NOW}", *["v1=00"] * 10_000, right])]) == "signature_malformed"
    assert refusal([f"t={NOW}," + "," * 1_000_000]) == "signature_malformed"
    assert not computed
    assert refusal([f"t={NOW},{right}"]) is None
    assert len(computed) == 1
