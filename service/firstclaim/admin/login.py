"""Login and logout.

Guarantees: a password is compared only if the form came from the login page and the rate limit allows it. Passwords are
compared in a thread, one at a time, so that attempts cannot use up the processor or the memory that deliveries need.
Every login starts a new session. Successful and failed logins are logged with the address, never with what was typed.
"""

import asyncio
import re
import secrets
from typing import Final
from urllib.parse import quote

import structlog
from starlette.responses import Response

from firstclaim.admin.limits import LoginLimit
from firstclaim.admin.request import LOGIN_MOST_BYTES, AdminRequest, PageError, own_address
from firstclaim.admin.session import LASTS_SECONDS, Signer, is_equal
from firstclaim.passwords import MAX_CHARACTERS, Password

log = structlog.get_logger(__name__)

_FORM_SECONDS: Final = 3600
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32}")


class Login:
    """The login page, the login and the logout."""

    def __init__(self, password: Password, signer: Signer, limit: LoginLimit) -> None:
        self._password = password
        self._signer = signer
        self._limit = limit
        self._one_at_a_time = asyncio.Semaphore(1)  # a comparison needs 32 MiB

    @staticmethod
    def address(request: AdminRequest, where: str) -> str:
        """The address of the login page that leads to `where`."""
        return f"{request.home}/login?next={quote(where, safe='')}"

    async def show(self, request: AdminRequest) -> Response:
        """The login page."""
        where = own_address(request.http_request.query_params.get("next", ""), request.home)
        return request.redirect(where) if request.session is not None else _login_form(request, where)

    async def log_in(self, request: AdminRequest) -> Response:
        """Compare the password and start a session."""
        await request.read_form(LOGIN_MOST_BYTES)
        where = own_address(request.form_value("next"), request.home)
        # There is no session yet, so the CSRF token is a value that must be in the cookie and in the form. Another site
        # can neither read the cookie nor, because of the prefix __Host-, set it. Nothing signed is sent before the
        # login: a signature would let an attacker check guesses offline.
        login_token = request.cookie_value("login")
        if login_token is None:
            text = "Your browser did not send the cookie of the login page. It does not over plain HTTP: use https."
            raise PageError(403, "Not from the login page", text)
        if not is_equal(login_token, request.form_value("token")):
            raise PageError(403, "Not from the login page", "Load the login page again.")
        if wait := self._limit.take(request.address):
            log.warning("admin_login_limited", address=request.address)
            problem = f"Too many attempts. Try again in {wait} s."
            return _login_form(request, where, 429, problem, {"Retry-After": str(wait)})
        typed = request.form_value("password")[:MAX_CHARACTERS]
        async with self._one_at_a_time:
            is_correct = await asyncio.to_thread(self._password.matches, typed)
        if not is_correct:
            log.warning("admin_login_failed", address=request.address)
            return _login_form(request, where, 401, "The password is wrong.")
        self._limit.reset(request.address)
        log.info("admin_login", address=request.address)
        session = self._signer.dump_session(self._signer.start_session())
        request.set_cookies = [request.cookie("session").set(session, LASTS_SECONDS), request.cookie("login").drop()]
        return request.redirect(where)

    async def log_out(self, request: AdminRequest) -> Response:
        """Delete the session's cookie."""
        log.info("admin_logout", address=request.address)
        request.set_cookies = [request.cookie(name).drop() for name in ("session", "notice")]
        return request.redirect(f"{request.home}/login")


def _login_form(
    request: AdminRequest, where: str, status: int = 200, problem: str = "", headers: dict[str, str] | None = None
) -> Response:
    token = request.cookie_value("login") or ""
    if not _TOKEN.fullmatch(token):  # a valid one is kept: a second tab must not break the form of the first
        token = secrets.token_urlsafe(24)
    request.set_cookies.append(request.cookie("login").set(token, _FORM_SECONDS))
    response = request.render("login.html", status, next=where, login_token=token, problem=problem)
    response.headers.update(headers or {})
    return response
