"""Sessions of the admin page: the page's state is in signed cookies.

Guarantees: only values that were signed with the key of this password are accepted. Workers share nothing and sessions
survive a restart; a new password ends every session. A session ends after 8 hours, or after 30 minutes without a
request. Cookies are HttpOnly and SameSite=Strict. They are also Secure, with the prefix `__Host-` (no page of a sibling
domain can set one), unless the address is the browser's own machine.

The price: a logout deletes the cookie from the browser, but a copy that was stolen before stays valid until it has not
been used for 30 minutes. A new password ends it at once.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

from firstclaim.admin.identity import Role

LASTS_SECONDS = 8 * 3600  # a working day
IDLE_SECONDS = 30 * 60
_RENEWED_SECONDS = 60  # a session is not renewed with every response
_AHEAD_SECONDS = 60  # clocks of the machines of several workers differ


@dataclass(frozen=True, slots=True)
class Session:
    """A session. Instants are unix seconds. `user` is the name that a proxy gave, None after a login by password."""

    id: str
    began_at: float
    seen_at: float
    user: str | None = None
    role: Role = Role.OPERATOR


@dataclass(frozen=True, slots=True)
class Cookie:
    """A cookie of the page."""

    name: str
    secure: bool
    prefix: str = ""

    @property
    def full_name(self) -> str:
        """The name in the browser. It differs without TLS, so that neither cookie is taken for the other.

        It also differs with the prefix of the application's paths: `__Host-` demands `Path=/`, so nothing else would
        keep the cookies of two services on one host apart.
        """
        of_prefix = f"-{hashlib.sha256(self.prefix.encode()).hexdigest()[:8]}" if self.prefix else ""
        name = f"firstclaim-{self.name}{of_prefix}"
        return f"__Host-{name}" if self.secure else name

    def set(self, value: str, lasts_seconds: int) -> str:
        """The header `Set-Cookie` that sets the cookie."""
        attributes = f"Path=/; Max-Age={lasts_seconds}; HttpOnly; SameSite=Strict" + ("; Secure" if self.secure else "")
        return f"{self.full_name}={value}; {attributes}"

    def drop(self) -> str:
        """The header `Set-Cookie` that deletes the cookie."""
        return self.set("", 0)


class Signer:
    """Signs values that the browser stores, and verifies them. `now` is the clock, in unix seconds."""

    def __init__(self, key: bytes, now: Callable[[], float] = time.time) -> None:
        self._key = key
        self._now = now

    # -- sessions -------------------------------------------------------------------------------------

    def start_session(self) -> Session:
        """A new session. It never has the id of an earlier one, which an attacker may have planted."""
        return Session(secrets.token_urlsafe(18), self._now(), self._now())

    def dump_session(self, session: Session) -> str:
        """The value of the session's cookie."""
        return self._dumps("session", [session.id, session.began_at, session.seen_at])

    def load_session(self, text: str | None) -> Session | None:
        """The session in a value of `dump_session`; None if it is not valid or has ended."""
        content = self._loads("session", text)
        if content is None:
            return None
        session = Session(*content)
        has_ended = self._now() > min(session.began_at + LASTS_SECONDS, session.seen_at + IDLE_SECONDS)
        return None if has_ended or session.seen_at > self._now() + _AHEAD_SECONDS else session

    def renew_session(self, session: Session) -> Session | None:
        """The session with the current time as `seen_at`; None if it was renewed within the last minute."""
        return replace(session, seen_at=self._now()) if self._now() - session.seen_at > _RENEWED_SECONDS else None

    def proxy_session(self, user: str, role: Role) -> Session:
        """The session of a user whom a proxy names with each request. It needs no cookie, and ends with the proxy's.

        No login by password has its id, which has no colon.
        """
        return Session(f"user:{user}", self._now(), self._now(), user, role)

    # -- values of one session ------------------------------------------------------------------------

    def csrf_token(self, session: Session) -> str:
        """The CSRF token that every form must send: only pages of this session have it."""
        return hmac.digest(self._key, f"form {session.id}".encode(), "sha256").hex()

    def is_csrf_token(self, session: Session, token: str) -> bool:
        """Whether `token` is the session's CSRF token; compared in constant time."""
        return is_equal(self.csrf_token(session), token)

    def sign_value(self, session: Session, purpose: str, content: Any) -> str:
        """`content` (JSON) as a signed text that is valid only in this session and for this purpose."""
        return self._dumps(purpose, [session.id, self._now(), content])

    def verify_value(self, session: Session, purpose: str, text: str | None, within_seconds: float) -> Any | None:
        """The content that `sign_value` signed for this purpose, at most that long ago; None if it is not valid."""
        loaded = self._loads(purpose, text)
        if loaded is None:
            return None
        session_id, at, content = loaded
        return content if is_equal(session_id, session.id) and 0 <= self._now() - at <= within_seconds else None

    # -- shared ---------------------------------------------------------------------------------------

    def _dumps(self, purpose: str, content: Any) -> str:
        text = self._serializer(purpose).dumps(content)
        return text if isinstance(text, str) else text.decode()

    def _loads(self, purpose: str, text: str | None) -> Any | None:
        try:
            return self._serializer(purpose).loads(text or "")
        except (BadData, UnicodeError):
            return None

    def _serializer(self, purpose: str) -> URLSafeSerializer:
        signing = {"digest_method": hashlib.sha256, "key_derivation": "hmac"}
        return URLSafeSerializer(self._key, salt=f"firstclaim admin {purpose}", signer_kwargs=signing)


def is_equal(one: str, other: str) -> bool:
    """Whether two texts are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))
