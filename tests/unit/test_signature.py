"""The verification of signatures, with stripe-python's own generator and verifier as the oracle."""

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
    """The header that Stripe's own library generates for `body`."""
    return str(stripe.WebhookSignature.generate_signature_header(body.decode(), secret, at))


def v1(secret: str = SECRET, body: bytes = BODY, at: int = NOW) -> str:
    return header(secret, body, at).partition(",")[2]


def refusal(
    headers: Sequence[str], body: bytes = BODY, secrets: Sequence[str] = (SECRET,), now: float = NOW
) -> str | None:
    """The kind of rejection, or None if accepted. Any other exception fails the test."""
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
    """A header that stripe-python generates with our secret is accepted."""
    assert refusal([header()]) is None


def test_any_configured_secret_is_accepted() -> None:
    """While a secret is rolled, two are configured, in any order, and a signature by either is accepted."""
    assert refusal([header(OTHER)], secrets=(SECRET, OTHER)) is None
    assert refusal([header(SECRET)], secrets=(SECRET, OTHER)) is None


def test_any_of_several_signatures_is_accepted() -> None:
    """While a secret is rolled, Stripe sends one `v1` per secret, and ours may be any of them."""
    for items in ([v1(), v1(OTHER)], [v1(OTHER), v1()], [v1("x"), v1("y"), v1()]):
        assert refusal([",".join([f"t={NOW}", *items])]) is None


def test_other_schemes_are_ignored() -> None:
    """Items of the scheme `v0`, and of schemes that Stripe may add, do not change the result."""
    assert refusal([f"t={NOW},v0=dead,{v1()},v2=beef"]) is None
    assert refusal([f"{v1()},t={NOW}"]) is None


@pytest.mark.parametrize(
    "spaced",
    [
        f"t={NOW}, {v1()}",
        f"t={NOW},\t{v1()}",
        f"t={NOW} , {v1()}",
        f"t={NOW}, \t v0=dead ,  {v1(OTHER)}\t,\t{v1()}",
        f" t={NOW},{v1()} ",
        f"{v1()}, t={NOW}",
    ],
)
def test_blanks_around_a_comma_are_accepted(spaced: str) -> None:
    """Blanks and tabs around the commas, which HTTP allows in a list, do not change the result."""
    assert refusal([spaced]) is None


@pytest.mark.parametrize("away", [-300, 0, 300])
def test_the_tolerance_is_two_sided_and_inclusive(away: int) -> None:
    """A timestamp of exactly 300 s in either direction is within the tolerance."""
    assert refusal([header()], now=NOW + away) is None


def test_a_body_beyond_ascii_is_verified_as_bytes() -> None:
    """UTF-8 text, a BOM and a NUL in the body are verified as the bytes that they are."""
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
        ([f"t ={NOW},{v1()}"], "signature_malformed"),
        ([f"t={NOW},\n{v1()}"], "signature_mismatch"),
        ([f"t={NOW},v1= {v1()[3:]}"], "signature_mismatch"),
        ([f"t={NOW}, ,{v1()}"], "signature_malformed"),
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
    """A missing, repeated, malformed or mismatching header is a 400, and never an exception of stripe-python's."""
    assert refusal(headers) == kind


@pytest.mark.parametrize("away", [-301, 301, -(10**9), 10**9])
def test_stale_and_future_are_refused(away: int) -> None:
    """A timestamp beyond the tolerance is refused in both directions; stripe-python accepts the future."""
    assert refusal([header()], now=NOW + away) == "signature_stale"


def test_stripe_python_accepts_the_future() -> None:
    """Our own check is still needed: if this fails, stripe-python's tolerance has become two-sided too."""
    ahead = int(time.time()) + 10**6
    assert stripe.WebhookSignature.verify_header(BODY.decode(), header(at=ahead), SECRET, tolerance=300)
    assert refusal([header(at=ahead)], now=time.time()) == "signature_stale"


def test_another_secret_is_refused() -> None:
    """A signature made with a secret that is not configured is refused."""
    assert refusal([header("whsec_wrong")], secrets=(SECRET, OTHER)) == "signature_mismatch"


def test_no_secret_verifies_nothing() -> None:
    """With no secret or a blank one, every signature is refused, even one that was made with the blank secret."""
    blank = hmac.new(b"", b"%d.%b" % (NOW, BODY), hashlib.sha256).hexdigest()
    assert refusal([f"t={NOW},v1={blank}"], secrets=()) == "signature_mismatch"
    assert refusal([f"t={NOW},v1={blank}"], secrets=("",)) == "signature_mismatch"


@pytest.mark.parametrize("body", [BODY + b" ", BODY[:-1], b"", BODY.replace(b"evt_1", b"evt_2")])
def test_a_changed_body_is_refused(body: bytes) -> None:
    """A body that differs from the signed one by a single byte is refused."""
    assert refusal([header()], body) == "signature_mismatch"


@pytest.mark.parametrize("body", [b"\xff", b"\xed\xa0\x80", BODY + b"\xc0"])
def test_a_body_that_is_not_utf8_is_refused(body: bytes) -> None:
    """A body that is not UTF-8, which Stripe cannot have sent, is a 400 even if its digest is right."""
    digest = hmac.new(SECRET.encode(), b"%d.%b" % (NOW, body), hashlib.sha256).hexdigest()
    assert refusal([f"t={NOW},v1={digest}"], body) == "body_not_utf8"


def test_ten_thousand_signatures_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 10,000 signatures is refused before any digest is computed, even though one of them is right."""
    computed: list[bytes] = []
    right = v1()
    compute = hmac.digest

    def counted(key: bytes, message: bytes, digest: str) -> bytes:
        computed.append(message)
        return compute(key, message, digest)

    monkeypatch.setattr("firstclaim.web.signature.hmac.digest", counted)
    assert refusal([",".join([f"t={NOW}", *["v1=00"] * 10_000, right])]) == "signature_malformed"
    assert refusal([f"t={NOW}," + "," * 1_000_000]) == "signature_malformed"
    assert not computed
    assert refusal([f"t={NOW},{right}"]) is None
    assert len(computed) == 1
