"""The admin page's password, as its setting holds it: a plain value, or the hash of one.

Guarantees: both are compared the same way, scrypt's result with scrypt's result in constant time, so neither how long
a guess takes nor where it first differs tells anything. A hash is written `scrypt:n:r:p:salt:hash`, in base64 that
needs no quoting and without `$`, which shells and compose files would take for a variable. From either comes the key
that signs the sessions: another password is another key, and everybody is logged out.
"""

import base64
import hashlib
import hmac
import re
import secrets
import unicodedata
from dataclasses import dataclass, field

MIN_CHARACTERS = 12  # a guess costs a tenth of a second here, and twenty a minute are let through
MAX_CHARACTERS = 1024

_N, _R, _P = 2**15, 8, 3  # OWASP's choice for 32 MiB: a tenth of a second or two
_N_RANGE, _R_RANGE, _P_RANGE = (2**14, 2**17), (8, 16), (1, 8)
_MEMORY_MOST_BYTES = 128 * 2**20
_HASH = re.compile(r"scrypt:(\d{1,7}):(\d{1,3}):(\d{1,3}):([A-Za-z0-9_-]{16,128}):([A-Za-z0-9_-]{43})")
_HASH_BYTES = 32
# Every worker and every restart has to come to the same key, so a plain value's salt is a constant. What is made from
# it goes nowhere but into signatures that only those get to see who knew the password.
_SALT_OF_PLAIN = b"firstclaim admin page, plain value"


@dataclass(frozen=True, slots=True)
class Password:
    """What a guess is compared with."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    n: int = _N
    r: int = _R
    p: int = _P

    @classmethod
    def read(cls, value: str) -> "Password":
        """From the setting; takes a tenth of a second for a plain one. Raises ValueError, as `check` does."""
        check(value)
        if (found := _HASH.fullmatch(value)) is not None:
            n, r, p, salt, digest = found.groups()
            return cls(_from_base64(salt), _from_base64(digest), int(n), int(r), int(p))
        return cls(_SALT_OF_PLAIN, _scrypt(value, _SALT_OF_PLAIN, _N, _R, _P))

    def matches(self, guess: str) -> bool:
        """Whether it is the password; takes a tenth of a second of a core, so never call it on the event loop."""
        return hmac.compare_digest(_scrypt(guess, self.salt, self.n, self.r, self.p), self.digest)

    @property
    def session_key(self) -> bytes:
        """The key that signs sessions; 32 bytes."""
        return hmac.digest(self.digest, b"firstclaim admin session", "sha256")


def check(value: str) -> None:
    """Raise ValueError with a sentence, which holds nothing of `value`, unless it is a good plain value or a hash."""
    if value.startswith("scrypt:"):
        found = _HASH.fullmatch(value)
        if found is None:
            raise ValueError("begins with scrypt: and is no hash: make one with `firstclaim admin-password`")
        numbers = [int(number) for number in found.groups()[:3]]
        within = all(
            least <= number <= most
            for number, (least, most) in zip(numbers, (_N_RANGE, _R_RANGE, _P_RANGE), strict=True)
        )
        n, r, _ = numbers
        if not within or n & (n - 1) or 128 * n * r > _MEMORY_MOST_BYTES:
            raise ValueError("is a hash with costs out of range: make one with `firstclaim admin-password`")
        return
    if len(value) < MIN_CHARACTERS:
        raise ValueError(f"is too short to stand before an admin page: at least {MIN_CHARACTERS} characters")
    if len(value) > MAX_CHARACTERS or value != value.strip() or not value.isprintable():
        raise ValueError("has white space around it, a character that cannot be typed, or is over 1024 characters long")


def make_hash(password: str) -> str:
    """What to set instead of `password`, another one on every call. Raises ValueError, as `check` does."""
    if password.startswith("scrypt:"):
        raise ValueError("begins with scrypt:, as only a hash does")
    check(password)
    salt = secrets.token_bytes(16)
    return f"scrypt:{_N}:{_R}:{_P}:{_to_base64(salt)}:{_to_base64(_scrypt(password, salt, _N, _R, _P))}"


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # One keyboard sends an accented letter as one character, another as two.
    text = unicodedata.normalize("NFC", password).encode(errors="replace")
    return hashlib.scrypt(text, salt=salt, n=n, r=r, p=p, maxmem=2 * _MEMORY_MOST_BYTES, dklen=_HASH_BYTES)


def _to_base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def _from_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
