"""Sessions, CSRF tokens, signed values and login limits of the admin page."""

import pytest

from firstclaim.admin import session as sessions
from firstclaim.admin.limits import ADDRESS_ATTEMPTS, ADDRESSES_MOST, ALL_ATTEMPTS, LoginLimit
from firstclaim.admin.session import IDLE_SECONDS, LASTS_SECONDS, Cookie, Signer

KEY = b"k" * 32


class Clock:
    """A clock that the test sets."""

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


def test_a_session_is_loaded_again(signer: Signer, clock: Clock) -> None:
    """A dumped session is loaded again, also by another worker that has only the key."""
    session = signer.start_session()
    assert signer.load_session(signer.dump_session(session)) == session
    assert Signer(KEY, clock).load_session(signer.dump_session(session)) == session


def test_no_two_logins_share_an_id(signer: Signer) -> None:
    """A planted session id is never the id of a new session."""
    assert len({signer.start_session().id for _ in range(100)}) == 100


def test_another_key_loads_no_session(signer: Signer, clock: Clock) -> None:
    """A new password ends every session."""
    assert Signer(b"o" * 32, clock).load_session(signer.dump_session(signer.start_session())) is None


def test_a_changed_cookie_is_not_valid(signer: Signer) -> None:
    """Any changed, missing or added character invalidates the cookie."""
    text = signer.dump_session(signer.start_session())
    for index in range(len(text)):
        changed = text[:index] + ("A" if text[index] != "A" else "B") + text[index + 1 :]
        # The last character of a base64 text can hold unused bits: then it is the same text.
        assert signer.load_session(changed) in ((None,) if index < len(text) - 1 else (None, signer.load_session(text)))
    for other in ("", None, text[:-1], text + "A", text.upper(), "." * 50, "\ud800", "é"):
        assert signer.load_session(other) is None, other


def test_an_idle_session_ends(signer: Signer, clock: Clock) -> None:
    """A session ends after half an hour without a request; a used one is renewed, but not with every response."""
    session = signer.start_session()
    assert signer.renew_session(session) is None
    clock.now += IDLE_SECONDS
    assert signer.load_session(signer.dump_session(session)) == session
    renewed = signer.renew_session(session)
    assert renewed is not None
    clock.now += 1
    assert signer.load_session(signer.dump_session(session)) is None
    assert signer.load_session(signer.dump_session(renewed)) == renewed


def test_a_used_session_ends_too(signer: Signer, clock: Clock) -> None:
    """A session ends after eight hours, however much it is used."""
    session, began = signer.start_session(), clock.now
    while clock.now < began + LASTS_SECONDS:
        found = signer.load_session(signer.dump_session(session))
        assert found is not None
        session = signer.renew_session(found) or found
        clock.now += IDLE_SECONDS / 2
    clock.now += 1
    assert signer.load_session(signer.dump_session(session)) is None


def test_a_session_of_the_future_is_not_valid(signer: Signer, clock: Clock) -> None:
    """A small difference between clocks is accepted; a larger one is not."""
    session = signer.start_session()
    clock.now -= 30
    assert signer.load_session(signer.dump_session(session)) == session
    clock.now -= 3600
    assert signer.load_session(signer.dump_session(session)) is None


def test_a_csrf_token_belongs_to_one_session(signer: Signer) -> None:
    """Another session's token is not valid, and tokens are compared in constant time."""
    one, other = signer.start_session(), signer.start_session()
    assert signer.is_csrf_token(one, signer.csrf_token(one))
    for wrong in (signer.csrf_token(other), "", signer.csrf_token(one)[:-1], one.id, "\ud800"):
        assert not signer.is_csrf_token(one, wrong)
    assert "compare_digest" in sessions.is_equal.__code__.co_names


def test_a_signed_value_is_for_one_session_and_one_purpose(signer: Signer, clock: Clock) -> None:
    """A signed value is not valid in another session, for another purpose, changed, or too late."""
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
    """No script can read a cookie and no other site can send it; with TLS it is bound to TLS and the host."""
    secure, plain = Cookie("session", secure=True).set("v", 60), Cookie("session", secure=False).set("v", 60)
    assert secure == "__Host-firstclaim-session=v; Path=/; Max-Age=60; HttpOnly; SameSite=Strict; Secure"
    assert plain == "firstclaim-session=v; Path=/; Max-Age=60; HttpOnly; SameSite=Strict"
    assert "Max-Age=0" in Cookie("session", secure=True).drop()


# -- limits -------------------------------------------------------------------------------------------


def test_an_address_has_a_limit(clock: Clock) -> None:
    """After its attempts an address must wait for one more; an attempt in the meantime costs nothing."""
    limit = LoginLimit(clock)
    assert [limit.take("192.0.2.1") for _ in range(ADDRESS_ATTEMPTS)] == [0] * ADDRESS_ATTEMPTS
    assert [limit.take("192.0.2.1") for _ in range(3)] == [60] * 3
    clock.now += 60
    assert limit.take("192.0.2.1") == 0
    assert limit.take("192.0.2.1") > 0
    assert limit.take("192.0.2.2") == 0


def test_all_addresses_have_a_common_limit(clock: Clock) -> None:
    """The common limit holds for any number of addresses."""
    limit = LoginLimit(clock)
    assert [limit.take(f"192.0.2.{n}") for n in range(ALL_ATTEMPTS)] == [0] * ALL_ATTEMPTS
    assert limit.take("198.51.100.1") == 3
    clock.now += 3
    assert limit.take("198.51.100.1") == 0


def test_a_login_resets_the_limit(clock: Clock) -> None:
    """After a login, earlier wrong attempts of the address do not count."""
    limit = LoginLimit(clock)
    for _ in range(ADDRESS_ATTEMPTS):
        limit.take("192.0.2.1")
    limit.reset("192.0.2.1")
    assert limit.take("192.0.2.1") == 0


def test_a_network_of_ipv6_is_one_address(clock: Clock) -> None:
    """A /64 of IPv6 counts as one address, and a mapped IPv4 address as that IPv4 address."""
    limit = LoginLimit(clock)
    for n in range(ADDRESS_ATTEMPTS):
        assert limit.take(f"2001:db8::{n}") == 0
    assert limit.take("2001:db8::ffff") > 0
    assert limit.take("2001:db8:0:1::1") == 0
    for _ in range(ADDRESS_ATTEMPTS):
        limit.take("192.0.2.7")
    assert limit.take("::ffff:192.0.2.7") > 0


def test_memory_for_addresses_is_bounded(clock: Clock) -> None:
    """The address without an attempt for the longest time is forgotten; malformed ones count as one."""
    limit = LoginLimit(clock)
    for n in range(3 * ADDRESSES_MOST):
        limit.take(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
    assert len(limit._addresses) == ADDRESSES_MOST
    for n in range(10):
        limit.take(f"nonsense {n}")
    assert len(limit._addresses) == ADDRESSES_MOST
    assert "unknown" in limit._addresses
