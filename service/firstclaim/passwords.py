"""The admin page's password, as its setting holds it: a plain value or a hash.

Guarantees: both forms are compared in the same way, by constant-time comparison of two scrypt results, so the duration
of a comparison reveals nothing. A hash is written `scrypt:n:r:p:salt:hash`, in URL-safe base64 and without `$`, which
shells and compose files would expand as a variable. The key that signs the sessions is derived from the password: a new
password is a new key, which ends all sessions.
"""

import base64
import hashlib
import hmac
import re
import secrets
import unicodedata
from dataclasses import dataclass, field

MIN_CHARACTERS = 12  # checking a guess takes a tenth of a second, and twenty guesses a minute are accepted
MAX_CHARACTERS = 1024

_N, _R, _P = 2**15, 8, 3  # OWASP's recommendation for 32 MiB; takes one or two tenths of a second
_N_RANGE, _R_RANGE, _P_RANGE = (2**14, 2**17), (8, 16), (1, 8)
_MAX_MEMORY_BYTES = 128 * 2**20
_HASH = re.compile(r"scrypt:(\d{1,7}):(\d{1,3}):(\d{1,3}):([A-Za-z0-9_-]{16,128}):([A-Za-z0-9_-]{43})")
_HASH_BYTES = 32
# The salt of a plain value is a constant, because every worker and every restart must derive the same key. The result
# is used only in signatures, which only users who know the password get to see.
_PLAIN_SALT = b"firstclaim admin page, plain value"


@dataclass(frozen=True, slots=True)
class Password:
    """A password that a guess can be compared with."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    n: int
    r: int
    p: int

    @classmethod
    def read(cls, value: str) -> "Password":
        """Read the value of the setting. A plain value takes a tenth of a second. Raises ValueError like `check`."""
        check(value)
        if (found := _HASH.fullmatch(value)) is not None:
            n, r, p, salt, digest = found.groups()
            return cls(_from_base64(salt), _from_base64(digest), int(n), int(r), int(p))
        return cls(_PLAIN_SALT, _scrypt(value, _PLAIN_SALT, _N, _R, _P), _N, _R, _P)

    def matches(self, guess: str) -> bool:
        """Whether `guess` is the password. Takes a tenth of a second of CPU time: do not call it on the event loop."""
        return hmac.compare_digest(_scrypt(guess, self.salt, self.n, self.r, self.p), self.digest)

    @property
    def session_key(self) -> bytes:
        """The key that signs sessions, 32 bytes."""
        return hmac.digest(self.digest, b"firstclaim admin session", "sha256")


def check(value: str) -> None:
    """Raise ValueError unless `value` is a valid plain value or hash. The message holds nothing of `value`."""
    if value.startswith("scrypt:"):
        found = _HASH.fullmatch(value)
        if found is None:
            raise ValueError("begins with scrypt: but is not a hash: create one with `firstclaim admin-password`")
        numbers = [int(number) for number in found.groups()[:3]]
        within = all(
            low <= number <= high for number, (low, high) in zip(numbers, (_N_RANGE, _R_RANGE, _P_RANGE), strict=True)
        )
        n, r, _ = numbers
        if not within or n & (n - 1) or 128 * n * r > _MAX_MEMORY_BYTES:
            raise ValueError("is a hash with costs out of range: create one with `firstclaim admin-password`")
        return
    if len(value) < MIN_CHARACTERS:
        raise ValueError(f"is too short: use at least {MIN_CHARACTERS} characters")
    if len(value) > MAX_CHARACTERS or value != value.strip() or not value.isprintable():
        raise ValueError("has white space around it or an unprintable character, or is longer than 1024 characters")


def make_hash(password: str) -> str:
    """The hash to set instead of `password`. Each call uses a new salt. Raises ValueError, as `check` does."""
    if password.startswith("scrypt:"):
        raise ValueError("begins with scrypt: and is therefore a hash, not a password")
    check(password)
    salt = secrets.token_bytes(16)
    return f"scrypt:{_N}:{_R}:{_P}:{_to_base64(salt)}:{_to_base64(_scrypt(password, salt, _N, _R, _P))}"


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # Some keyboards send an accented letter as one character, others as two.
    text = unicodedata.normalize("NFC", password).encode(errors="replace")
    return hashlib.scrypt(text, salt=salt, n=n, r=r, p=p, maxmem=2 * _MAX_MEMORY_BYTES, dklen=_HASH_BYTES)


def _to_base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def _from_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
