"""The admin page's password: plain or hashed, and what is refused as one."""

import hmac
from typing import Any

import pytest

from firstclaim import passwords
from firstclaim.passwords import MIN_CHARACTERS, Password, check, make_hash

PLAIN = "correct horse battery staple"


def test_a_plain_value_and_its_hash_mean_the_same() -> None:
    """Both let the password in and nothing else, not what begins like it either."""
    for password in (Password.read(PLAIN), Password.read(make_hash(PLAIN))):
        assert password.matches(PLAIN)
        for wrong in ("", PLAIN[:-1], PLAIN + "x", PLAIN.upper(), make_hash(PLAIN), "\ud800", "\0"):
            assert not password.matches(wrong), wrong


def test_an_accent_is_typed_in_two_ways() -> None:
    """One keyboard sends one character where another sends two; they are the same password."""
    assert Password.read("caf\u00e9 caf\u00e9 caf\u00e9").matches("cafe\u0301 cafe\u0301 cafe\u0301")


def test_a_hash_is_another_one_each_time_and_needs_no_quoting() -> None:
    """Its salt is fresh, and no shell or compose file finds anything in it to expand."""
    one, other = make_hash(PLAIN), make_hash(PLAIN)
    assert one != other
    assert not set(one) & set("$\\'\"` #\n")
    assert PLAIN not in one


def test_it_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared are two results of scrypt, of one length, by the function that is made for it."""
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
    """Sessions of the old one are worth nothing; every worker and every restart comes to the same key."""
    hashed = make_hash(PLAIN)
    keys = [Password.read(value).session_key for value in (PLAIN, PLAIN + "!", hashed, make_hash(PLAIN))]
    assert len(set(keys)) == 4
    assert {len(key) for key in keys} == {32}
    assert Password.read(PLAIN).session_key == keys[0]
    assert Password.read(hashed).session_key == keys[2]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("x" * (MIN_CHARACTERS - 1), "too short"),
        (" " + "x" * 20, "white space"),
        ("x" * 20 + "\n", "white space"),
        ("x" * 20 + "\x1b", "cannot be typed"),
        ("x" * 2000, "1024"),
        ("scrypt:" + "x" * 20, "is no hash"),
        ("scrypt:32768:8:3:short:short", "is no hash"),
        ("scrypt:1024:8:1:AAAAAAAAAAAAAAAAAAAAAA:" + "A" * 43, "costs out of range"),
        ("scrypt:32767:8:3:AAAAAAAAAAAAAAAAAAAAAA:" + "A" * 43, "costs out of range"),
        ("scrypt:131072:16:1:AAAAAAAAAAAAAAAAAAAAAA:" + "A" * 43, "costs out of range"),
    ],
)
def test_what_cannot_be_one_is_refused(value: str, says: str) -> None:
    """With a sentence that says why, and holds nothing of what was given."""
    with pytest.raises(ValueError, match=says) as refused:
        check(value)
    assert value.strip() not in str(refused.value)


def test_a_hash_is_not_hashed() -> None:
    """A hash that was pasted where the password was asked for would let in whoever reads the setting."""
    with pytest.raises(ValueError, match="as only a hash does"):
        make_hash(make_hash(PLAIN))


def test_nothing_of_it_is_shown() -> None:
    """Neither salt nor digest stand in what a log or a traceback would show of it."""
    assert "b'" not in repr(Password.read(PLAIN))
