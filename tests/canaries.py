"""Strings that must be found in nothing that is said: put into every input, looked for in every log and answer."""

from collections.abc import Mapping
from typing import Any, Final

SIGNING_SECRET: Final = "whsec_c4n4rys1gn1ngs3cret"
DATABASE_PASSWORD: Final = "c4n4rydatabasepassword"
REDIS_PASSWORD: Final = "c4n4ryredispassword"
API_KEY: Final = "sk_live_c4n4ryapikey"
CARD: Final = "4242424242424242"
EMAIL: Final = "c4n4ry@person.example"
TEXT: Final = "c4n4ryt3xt"  # payload data that looks like any other text

# What may be kept of an exception's message, in the ledger: anything but these.
REDACTED: Final = (SIGNING_SECRET, DATABASE_PASSWORD, API_KEY, CARD, EMAIL)
ALL: Final = (*REDACTED, REDIS_PASSWORD, TEXT)

DATABASE_URL: Final = f"postgresql://shop:{DATABASE_PASSWORD}@db.internal/shop"
STORY: Final = f"{TEXT} {EMAIL} paid with {CARD}, {API_KEY}, {SIGNING_SECRET}, {DATABASE_URL}"


def metadata(**more: str) -> Mapping[str, Any]:
    """For an event that holds all that an event can hold, and what should never be in one."""
    return {"story": STORY, "card": CARD, "email": EMAIL, "text": TEXT, TEXT: EMAIL, **more}


def assert_silent(said: str | bytes, allowed: tuple[str, ...] = ()) -> None:
    """None of them is in what was said, in whatever letters."""
    text = said.decode("latin-1") if isinstance(said, bytes) else said
    found = [canary for canary in ALL if canary not in allowed and canary.lower() in text.lower()]
    lines = [line[:400] for line in text.splitlines() if any(each.lower() in line.lower() for each in found)]
    assert not found, (found, lines[:5])
