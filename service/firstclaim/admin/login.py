"""In and out.

Guarantees: a password is looked at only when the form came from our own login page and the limit has a try left, in a
thread and one at a time, so that guesses cannot use up the processor or the memory that deliveries need; a login is
always a new session. Who came in and who did not is logged with the address, never with what was typed.
"""

import asyncio
import re
import secrets
from typing import Final
from urllib.parse import quote

import structlog
from starlette.responses import Response

from firstclaim.admin.limits import LoginLimit
from firstclaim.admin.request import LOGIN_MOST_BYTES, PATH, AdminRequest, Refused
from firstclaim.admin.session import LASTS_SECONDS, Signer, same
from firstclaim.passwords import MAX_CHARACTERS, Password

log = structlog.get_logger(__name__)

_FORM_SECONDS: Final = 3600
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32}")


class Login:
    """The login page and the way out."""

    def __init__(self, password: Password, signer: Signer, limit: LoginLimit) -> None:
        self._password = password
        self._signer = signer
        self._limit = limit
        self._one_at_a_time = asyncio.Semaphore(1)  # 32 MiB each

    @staticmethod
    def address(where: str) -> str:
        """Of the login page that leads to `where`."""
        return f"{PATH}/login?next={quote(where, safe='')}"

    async def show(self, visit: AdminRequest) -> Response:
        """The login page."""
        where = _own_path(visit.request.query_params.get("next", ""))
        return visit.go(where) if visit.session is not None else _form(visit, where)

    async def log_in(self, visit: AdminRequest) -> Response:
        """Compare, and begin a session."""
        await visit.read_form(LOGIN_MOST_BYTES)
        where = _own_path(visit.field("next"))
        # Nobody is known yet, so the token is a value that came by cookie and has to come by the form as well: another
        # site can neither read it nor, with the prefix __Host-, set it. Nothing signed is shown before the password is
        # known, or guesses could be checked against it at home.
        brought = visit.brought("login")
        if brought is None:
            text = "Your browser did not send the login page's cookie. Over plain HTTP it does not: come by https."
            raise Refused(403, "Not from the login page", text)
        if not same(brought, visit.field("token")):
            raise Refused(403, "Not from the login page", "Load the login page again.")
        if wait := self._limit.take(visit.address):
            log.warning("admin_login_limited", address=visit.address)
            return _form(visit, where, 429, f"Too many attempts. Try again in {wait} s.", {"Retry-After": str(wait)})
        async with self._one_at_a_time:
            right = await asyncio.to_thread(self._password.matches, visit.field("password")[:MAX_CHARACTERS])
        if not right:
            log.warning("admin_login_failed", address=visit.address)
            return _form(visit, where, 401, "That is not the password.")
        self._limit.forgive(visit.address)
        log.info("admin_login", address=visit.address)
        session = self._signer.write(self._signer.begin())
        visit.set_cookies = [visit.cookie("session").set(session, LASTS_SECONDS), visit.cookie("login").drop()]
        return visit.go(where)

    async def log_out(self, visit: AdminRequest) -> Response:
        """Take the session out of the browser."""
        log.info("admin_logout", address=visit.address)
        visit.set_cookies = [visit.cookie(name).drop() for name in ("session", "notice")]
        return visit.go(f"{PATH}/login")


def _form(
    visit: AdminRequest, where: str, status: int = 200, problem: str = "", headers: dict[str, str] | None = None
) -> Response:
    token = visit.brought("login") or ""
    if not _TOKEN.fullmatch(token):  # kept otherwise: a second tab does not spoil the first one's form
        token = secrets.token_urlsafe(24)
    visit.set_cookies.append(visit.cookie("login").set(token, _FORM_SECONDS))
    response = visit.page("login.html", status, next=where, login_token=token, problem=problem)
    response.headers.update(headers or {})
    return response


def _own_path(text: str) -> str:
    """Where to go after the login: on this page, or nowhere else but its beginning."""
    is_ours = text == PATH or text.startswith((f"{PATH}/", f"{PATH}?"))
    return text if is_ours and text.isprintable() and text.isascii() and "\\" not in text else PATH
