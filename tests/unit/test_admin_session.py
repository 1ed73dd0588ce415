"""Sessions, tokens and login limits of the admin page: what is believed, for how long, and how often one may try."""

import pytest

from firstclaim.admin import session as sessions
from firstclaim.admin.limits import ADDRESS_ATTEMPTS, ADDRESSES_MOST, ALL_ATTEMPTS, LoginLimit
from firstclaim.admin.session import IDLE_SECONDS, LASTS_SECONDS, Cookie, Signer

KEY = b"k" * 32


class Clock:
    """Stands until it is put forward."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signer(clock: Clock) -> Signer:
    return Signer(KEY, clock)


# -- sessions -----------------------------------------------------------------------------------------


def test_a_session_comes_back(signer: Signer, clock: Clock) -> None:
    """As it was written, also to another worker that knows nothing but the key."""
    session = signer.start_session()
    assert signer.load_session(signer.dump_session(session)) == session
    assert Signer(KEY, clock).load_session(signer.dump_session(session)) == session


def test_no_two_logins_share_an_id(signer: Signer) -> None:
    """A session that somebody planted is never the one that a login begins."""
    assert len({signer.start_session().id for _ in range(100)}) == 100


def test_another_key_believes_nothing(signer: Signer, clock: Clock) -> None:
    """A new password logs everybody out."""
    assert Signer(b"o" * 32, clock).load_session(signer.dump_session(signer.start_session())) is None


def test_a_cookie_that_was_meddled_with_is_nobody(signer: Signer) -> None:
    """Whichever character is changed, cut or added."""
    text = signer.dump_session(signer.start_session())
    for place in range(len(text)):
        changed = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        # The last character of a base64 text may hold bits that mean nothing: it is the same text then.
        assert signer.load_session(changed) in ((None,) if place < len(text) - 1 else (None, signer.load_session(text)))
    for other in ("", None, text[:-1], text + "A", text.upper(), "." * 50, "\ud800", "é"):
        assert signer.load_session(other) is None, other


def test_a_session_ends_when_nobody_uses_it(signer: Signer, clock: Clock) -> None:
    """After half an hour; whoever goes on is renewed, and not with every answer."""
    session = signer.start_session()
    assert signer.renew_session(session) is None
    clock.now += IDLE_SECONDS
    assert signer.load_session(signer.dump_session(session)) == session
    renewed = signer.renew_session(session)
    assert renewed is not None
    clock.now += 1
    assert signer.load_session(signer.dump_session(session)) is None
    assert signer.load_session(signer.dump_session(renewed)) == renewed


def test_a_session_ends_in_any_case(signer: Signer, clock: Clock) -> None:
    """After eight hours, however busy."""
    session, began = signer.start_session(), clock.now
    while clock.now < began + LASTS_SECONDS:
        found = signer.load_session(signer.dump_session(session))
        assert found is not None
        session = signer.renew_session(found) or found
        clock.now += IDLE_SECONDS / 2
    clock.now += 1
    assert signer.load_session(signer.dump_session(session)) is None


def test_a_session_of_the_future_is_none(signer: Signer, clock: Clock) -> None:
    """A little ahead is another machine's clock; more is nothing that was ever written."""
    session = signer.start_session()
    clock.now -= 30
    assert signer.load_session(signer.dump_session(session)) == session
    clock.now -= 3600
    assert signer.load_session(signer.dump_session(session)) is None


def test_a_token_is_one_session_s(signer: Signer) -> None:
    """Another login's token is none, and it is compared by the function that takes the same time."""
    one, other = signer.start_session(), signer.start_session()
    assert signer.is_csrf_token(one, signer.csrf_token(one))
    for wrong in (signer.csrf_token(other), "", signer.csrf_token(one)[:-1], one.id, "\ud800"):
        assert not signer.is_csrf_token(one, wrong)
    assert "compare_digest" in sessions.is_equal.__code__.co_names


def test_what_was_packed_is_for_one_session_and_one_purpose(signer: Signer, clock: Clock) -> None:
    """Brought back by another session, as something else, meddled with or too late, it is nothing."""
    one, other = signer.start_session(), signer.start_session()
    packed = signer.sign_value(one, "replay", [["evt_1", "failed", 3]])
    assert signer.verify_value(one, "replay", packed, 10) == [["evt_1", "failed", 3]]
    assert signer.verify_value(other, "replay", packed, 10) is None
    assert signer.verify_value(one, "notice", packed, 10) is None
    assert signer.verify_value(one, "replay", packed[1:], 10) is None
    assert signer.verify_value(one, "replay", signer.dump_session(one), 10) is None
    assert signer.load_session(packed) is None
    clock.now += 11
    assert signer.verify_value(one, "replay", packed, 10) is None


def test_cookies_have_their_flags() -> None:
    """Never readable by a script, never sent from elsewhere; with TLS alone and bound to the host, or another name."""
    secure, plain = Cookie("session", secure=True).set("v", 60), Cookie("session", secure=False).set("v", 60)
    assert secure == "__Host-firstclaim-session=v; Path=/; Max-Age=60; HttpOnly; SameSite=Strict; Secure"
    assert plain == "firstclaim-session=v; Path=/; Max-Age=60; HttpOnly; SameSite=Strict"
    assert "Max-Age=0" in Cookie("session", secure=True).drop()


# -- limits -------------------------------------------------------------------------------------------


def test_an_address_may_try_some_times(clock: Clock) -> None:
    """Then it is told how long to wait, and after that it may try once; trying meanwhile costs nothing more."""
    limit = LoginLimit(clock)
    assert [limit.take("192.0.2.1") for _ in range(ADDRESS_ATTEMPTS)] == [0] * ADDRESS_ATTEMPTS
    assert [limit.take("192.0.2.1") for _ in range(3)] == [60] * 3
    clock.now += 60
    assert limit.take("192.0.2.1") == 0
    assert limit.take("192.0.2.1") > 0
    assert limit.take("192.0.2.2") == 0


def test_all_together_may_try_some_times(clock: Clock) -> None:
    """However many addresses a guesser has."""
    limit = LoginLimit(clock)
    assert [limit.take(f"192.0.2.{n}") for n in range(ALL_ATTEMPTS)] == [0] * ALL_ATTEMPTS
    assert limit.take("198.51.100.1") == 3
    clock.now += 3
    assert limit.take("198.51.100.1") == 0


def test_who_came_in_may_try_again(clock: Clock) -> None:
    """A few mistypings before it do not count any more."""
    limit = LoginLimit(clock)
    for _ in range(ADDRESS_ATTEMPTS):
        limit.take("192.0.2.1")
    limit.reset("192.0.2.1")
    assert limit.take("192.0.2.1") == 0


def test_a_network_of_ipv6_is_one_address(clock: Clock) -> None:
    """Whoever has one has 2^64; IPv4 in IPv6's dress is the IPv4 that it is."""
    limit = LoginLimit(clock)
    for n in range(ADDRESS_ATTEMPTS):
        assert limit.take(f"2001:db8::{n}") == 0
    assert limit.take("2001:db8::ffff") > 0
    assert limit.take("2001:db8:0:1::1") == 0
    for _ in range(ADDRESS_ATTEMPTS):
        limit.take("192.0.2.7")
    assert limit.take("::ffff:192.0.2.7") > 0


def test_a_flood_of_addresses_grows_nothing(clock: Clock) -> None:
    """Of more addresses than are kept the longest silent is forgotten; what is no address is one together."""
    limit = LoginLimit(clock)
    for n in range(3 * ADDRESSES_MOST):
        limit.take(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
    assert len(limit._addresses) == ADDRESSES_MOST
    for n in range(10):
        limit.take(f"nonsense {n}")
    assert len(limit._addresses) == ADDRESSES_MOST
    assert "unknown" in limit._addresses
