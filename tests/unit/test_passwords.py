"""The admin page's password: plain and hashed values, and which values are refused."""

import hashlib
import hmac
from typing import Any

import pytest

from firstclaim import passwords
from firstclaim.passwords import MIN_CHARACTERS, Password, check, make_hash

PLAIN = "correct horse battery staple"
COSTS = passwords._N, passwords._R, passwords._P


@pytest.fixture(autouse=True)
def _the_lowest_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest that a hash may have, a sixth of the shipped ones: a comparison takes a tenth of a second of CPU."""
    monkeypatch.setattr(passwords, "_N", passwords._N_RANGE[0])
    monkeypatch.setattr(passwords, "_P", passwords._P_RANGE[0])


def test_the_shipped_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash has OWASP's costs for 32 MiB; a plain value is compared at the same ones."""
    monkeypatch.setattr(passwords, "_N", COSTS[0])
    monkeypatch.setattr(passwords, "_P", COSTS[2])
    assert make_hash(PLAIN).startswith("scrypt:32768:8:3:")
    plain = Password.read(PLAIN)
    assert (plain.n, plain.r, plain.p) == COSTS == (32768, 8, 3)
    assert plain.digest == hashlib.scrypt(PLAIN.encode(), salt=plain.salt, n=32768, r=8, p=3, maxmem=2**28, dklen=32)


def test_a_plain_value_and_its_hash_match_the_same_password() -> None:
    """A plain value and its hash match the password and nothing else, also no prefix of it."""
    for password in (Password.read(PLAIN), Password.read(make_hash(PLAIN))):
        assert password.matches(PLAIN)
        for wrong in ("", PLAIN[:-1], PLAIN + "x", PLAIN.upper(), make_hash(PLAIN), "\ud800", "\0"):
            assert not password.matches(wrong), wrong


def test_both_encodings_of_an_accent_match() -> None:
    """A password with an accent matches whether the keyboard sends one character or two."""
    assert Password.read("caf\u00e9 caf\u00e9 caf\u00e9").matches("cafe\u0301 cafe\u0301 cafe\u0301")


def test_a_hash_has_a_new_salt_and_needs_no_quoting() -> None:
    """Each hash has a new salt, and no character that a shell or a compose file would expand."""
    one, other = make_hash(PLAIN), make_hash(PLAIN)
    assert one != other
    assert not set(one) & set("$\\'\"` #\n")
    assert PLAIN not in one


def test_it_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scrypt results of the same length are compared, with `hmac.compare_digest`."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    class Hmac:
        compare_digest = staticmethod(compare)
        digest = staticmethod(hmac.digest)

    password = Password.read(PLAIN)
    monkeypatch.setattr(passwords, "hmac", Hmac)
    assert password.matches(PLAIN)
    assert not password.matches("x")
    assert [(len(one), len(other)) for one, other in compared] == [(32, 32)] * 2


def test_another_password_is_another_key() -> None:
    """Each password and each hash has its own session key, and the same key in every worker and after a restart."""
    hashed = make_hash(PLAIN)
    keys = [Password.read(value).session_key for value in (PLAIN, PLAIN + "!", hashed, make_hash(PLAIN))]
    assert len(set(keys)) == 4
    assert {len(key) for key in keys} == {32}
    assert Password.read(PLAIN).session_key == keys[0]
    assert Password.read(hashed).session_key == keys[2]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x" * (MIN_CHARACTERS - 1), "too short"),
        (" " + "x" * 20, "white space"),
        ("x" * 20 + "\n", "white space"),
        ("x" * 20 + "\x1b", "unprintable"),
        ("x" * 2000, "1024"),
        ("scrypt:" + "x" * 20, "is not a hash"),
        ("scrypt:32768:8:3:short:short", "is not a hash"),
        ("scrypt:1024:8:1:AAAAAAAAAAAAAAAAAAAAAA:" + "A" * 43, "costs out of range"),
        ("scrypt:32767:8:3:AAAAAAAAAAAAAAAAAAAAAA:" + "A" * 43, "costs out of range"),
        ("scrypt:131072:16:1:AAAAAAAAAAAAAAAAAAAAAA:" + "A" * 43, "costs out of range"),
    ],
)
def test_an_invalid_password_is_refused(value: str, reason: str) -> None:
    """An invalid value is refused with a message that says why, and holds nothing of the value."""
    with pytest.raises(ValueError, match=reason) as refused:
        check(value)
    assert value.strip() not in str(refused.value)


def test_a_hash_is_not_hashed() -> None:
    """A hash given as a password is refused: otherwise anyone who can read the setting could log in."""
    with pytest.raises(ValueError, match="is therefore a hash"):
        make_hash(make_hash(PLAIN))


def test_the_repr_shows_no_secret() -> None:
    """The repr, which may get into a log or a traceback, shows neither salt nor digest."""
    assert "b'" not in repr(Password.read(PLAIN))
