"""Who is logged in: everything that the page remembers lies in the browser, signed.

Guarantees: nothing that was not signed with this password's key is believed, so several workers and a restart agree
without sharing anything, and another password logs everybody out. A session ends after 8 hours, and after 30 minutes
in which nobody did anything. Cookies are HttpOnly and SameSite=Strict, and Secure with the prefix `__Host-` (no
neighbour's page can set one) wherever the address is not this very machine's.

What that costs: logging out takes the cookie out of the browser, and a copy of it that was stolen before lives until
it has not been used for 30 minutes. A new password ends it at once.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

LASTS_SECONDS = 8 * 3600  # a working day
IDLE_SECONDS = 30 * 60
_RENEWED_SECONDS = 60  # not with every answer
_AHEAD_SECONDS = 60  # another worker's machine may have another clock


@dataclass(frozen=True, slots=True)
class Session:
    """One login. Instants are unix seconds."""

    id: str
    began_at: float
    seen_at: float


@dataclass(frozen=True, slots=True)
class Cookie:
    """One that the page sets."""

    name: str
    secure: bool

    @property
    def full_name(self) -> str:
        """As the browser has it. Without TLS it is another one, so neither is ever taken for the other."""
        return f"__Host-firstclaim-{self.name}" if self.secure else f"firstclaim-{self.name}"

    def set(self, value: str, lasts_seconds: int) -> str:
        """The header `Set-Cookie`."""
        attributes = f"Path=/; Max-Age={lasts_seconds}; HttpOnly; SameSite=Strict" + ("; Secure" if self.secure else "")
        return f"{self.full_name}={value}; {attributes}"

    def drop(self) -> str:
        """The header that takes it out of the browser."""
        return self.set("", 0)


class Signer:
    """Signs what the browser keeps, and believes what it signed. `now` is the clock, unix seconds."""

    def __init__(self, key: bytes, now: Callable[[], float] = time.time) -> None:
        self._key = key
        self._now = now

    # -- sessions -------------------------------------------------------------------------------------

    def begin(self) -> Session:
        """A new login: never the id of an earlier one, which somebody else may have planted."""
        return Session(secrets.token_urlsafe(18), self._now(), self._now())

    def write(self, session: Session) -> str:
        """The cookie's value."""
        return self._text("session", [session.id, session.began_at, session.seen_at])

    def read(self, text: str | None) -> Session | None:
        """The session that `write` wrote, if it has not ended."""
        content = self._content("session", text)
        if content is None:
            return None
        session = Session(*content)
        over = self._now() > min(session.began_at + LASTS_SECONDS, session.seen_at + IDLE_SECONDS)
        return None if over or session.seen_at > self._now() + _AHEAD_SECONDS else session

    def renewed(self, session: Session) -> Session | None:
        """The same one, seen now; None: it was a moment ago."""
        return replace(session, seen_at=self._now()) if self._now() - session.seen_at > _RENEWED_SECONDS else None

    # -- what belongs to one --------------------------------------------------------------------------

    def token(self, session: Session) -> str:
        """What every form has to bring back: only a page of this session's can know it."""
        return hmac.digest(self._key, f"form {session.id}".encode(), "sha256").hex()

    def token_holds(self, session: Session, token: str) -> bool:
        """Whether a form brought it, in constant time."""
        return same(self.token(session), token)

    def pack(self, session: Session, what: str, content: Any) -> str:
        """`content` (JSON) as a text that only this session can bring back, and only as `what`."""
        return self._text(what, [session.id, self._now(), content])

    def unpack(self, session: Session, what: str, text: str | None, within_seconds: float) -> Any | None:
        """What was packed as `what`, not longer ago than that; None: it was not, or was meddled with."""
        found = self._content(what, text)
        if found is None:
            return None
        session_id, at, content = found
        return content if same(session_id, session.id) and 0 <= self._now() - at <= within_seconds else None

    # -- shared ---------------------------------------------------------------------------------------

    def _text(self, what: str, content: Any) -> str:
        text = self._serializer(what).dumps(content)
        return text if isinstance(text, str) else text.decode()

    def _content(self, what: str, text: str | None) -> Any | None:
        try:
            return self._serializer(what).loads(text or "")
        except (BadData, UnicodeError):
            return None

    def _serializer(self, what: str) -> URLSafeSerializer:
        signing = {"digest_method": hashlib.sha256, "key_derivation": "hmac"}
        return URLSafeSerializer(self._key, salt=f"firstclaim admin {what}", signer_kwargs=signing)


def same(one: str, other: str) -> bool:
    """Whether two texts are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))
