"""The routes under /admin, and what all of their responses have in common.

sqladmin 0.32 and starlette-admin 1.0 were tried in a browser with the headers below, and neither fits. sqladmin has no
CSRF tokens, logs out and runs its actions by GET, and does not limit logins. starlette-admin's `base.html` has inline
scripts and styles and a stylesheet of another host, and its CSRF cookie is not HttpOnly and only SameSite=Lax. Both
write rows through the ORM, but here a state may only change as `firstclaim.operations.commands` changes it: their main
purpose would be switched off. Therefore the page is a few server-rendered templates, which work without JavaScript. One
script of our own refreshes them.

Guarantees: everything except the login and the static files needs a session, which is checked here and not in each
page; so is the role that a form needs. Every change is a POST with the session's CSRF token, so GET changes nothing.
Every response, also an error, has `HEADERS`. No error page shows the cause of an internal error, or any of its text.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

import structlog
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Message, Receive, Scope, Send

from firstclaim.admin.audit import Audit
from firstclaim.admin.events import Events
from firstclaim.admin.identity import ProxyLogin, Role
from firstclaim.admin.login import Login
from firstclaim.admin.overview import Overview
from firstclaim.admin.rendering import Templates, static
from firstclaim.admin.replay import Replay
from firstclaim.admin.request import PATH, AdminRequest, PageError, client_address, is_loopback
from firstclaim.admin.session import LASTS_SECONDS, Signer
from firstclaim.errors import LedgerUnavailable, StatementTimeout
from firstclaim.observability.redaction import describe_error

log = structlog.get_logger(__name__)

Endpoint = Callable[[AdminRequest], Awaitable[Response]]

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",  # only our own files are run
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer, a browser sends `Origin: null` with our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}
_REQUEST_KEY = "firstclaim.admin_request"


class AdminPage:
    """The page as one ASGI application. `proxies` is the setting `admin_proxies`."""

    def __init__(
        self,
        signer: Signer,
        login: Login,
        proxy_login: ProxyLogin,
        overview: Overview,
        events: Events,
        replay: Replay,
        audit: Audit,
        proxies: int,
    ) -> None:
        self._signer = signer
        self._proxy_login = proxy_login
        self._templates = Templates()
        self._proxies = proxies
        self._router = Router(
            [
                _page_route("", overview.show),
                _page_route("/events", events.show_list),
                _page_route("/events/{event_id}", events.show),
                _form_route("/payload", events.show_payload),
                _page_route("/audit", audit.show_list),
                _page_route("/audit/{action_id:int}", audit.show),
                _form_route("/replay", replay.confirm, Role.OPERATOR),
                _form_route("/replay/confirmed", replay.replay, Role.OPERATOR),
                _form_route("/logout", login.log_out),
                _public_route("/login", login.show, "GET"),
                _public_route("/login", login.log_in, "POST"),
                _public_route("/static/{name}", _static_file, "GET"),
            ],
            redirect_slashes=False,
        )

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """Routes for the application: every path under `PATH` leads to this page."""
        return [Route(PATH, self), Route(PATH + "/{rest:path}", self)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; any error becomes an error page. A trailing slash makes no difference."""
        scope = {**scope, "path": scope["path"].removesuffix("/")}
        request = self._admin_request(Request(scope, receive))
        scope[_REQUEST_KEY] = request
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                for cookie in request.set_cookies:
                    headers.append("Set-Cookie", cookie)
            await send(message)

        try:
            await self._router(scope, receive, send_with_headers)
        except Exception as error:
            if has_started:
                raise
            await _error_page(request, error)(scope, receive, send_with_headers)

    def _admin_request(self, http_request: Request) -> AdminRequest:
        peer = http_request.client.host if http_request.client else None
        request = AdminRequest(
            http_request=http_request,
            templates=self._templates,
            signer=self._signer,
            address=client_address(peer, http_request.headers.getlist("x-forwarded-for"), self._proxies),
            # TLS can end at a proxy, and a header that says so can be forged. The host that the browser sends cannot:
            # unless it is the browser's own machine, the cookies are for TLS only, whatever is in between.
            secure=http_request.scope["scheme"] == "https" or not is_loopback(http_request.headers.get("host", "")),
        )
        named = [] if (header := self._proxy_login.header) is None else http_request.headers.getlist(header)
        if (user := self._proxy_login.user(peer, named)) is not None:
            request.session = self._signer.proxy_session(user, self._proxy_login.role(user))
            return request
        request.session = self._signer.load_session(request.cookie_value("session"))
        # A page that refreshes itself is not use: otherwise a forgotten tab would keep its session.
        is_refresh = "x-firstclaim-refresh" in http_request.headers
        renewed = None if request.session is None or is_refresh else self._signer.renew_session(request.session)
        if renewed is not None:
            request.set_cookies.append(request.cookie("session").set(self._signer.dump_session(renewed), LASTS_SECONDS))
        return request


def _error_page(request: AdminRequest, error: Exception) -> Response:
    """The error page for an exception."""
    match error:
        case PageError():
            page_error = error
        case HTTPException():
            page_error = _http_error(error.status_code, error.headers)
        case ClientDisconnect():
            return Response(status_code=400)  # the client has disconnected
        case StatementTimeout():
            text = "The query was stopped, so that it does not slow anything else. Narrow it by time, type or status."
            page_error = PageError(503, "The query took too long", text)
        case LedgerUnavailable():
            log.warning("admin_without_ledger", error=str(error))
            text = "Postgres is unreachable, or all connections of this page are busy. You are still logged in."
            page_error = PageError(503, "The ledger cannot be read", text, {"Retry-After": "5"})
        case _:
            log.error("admin_failed", error=describe_error(error))
            text = "The log has the details. No change is known to have been made."
            page_error = PageError(500, "This page failed", text)
    values = {"status": page_error.status, "title": page_error.title, "text": page_error.text}
    response = request.render("error.html", page_error.status, **values)
    response.headers.update(page_error.headers)
    return response


def _http_error(status: int, headers: Mapping[str, str] | None = None) -> PageError:
    return PageError(
        status, HTTPStatus(status).phrase, "This address does not exist, or does not accept this request.", headers
    )


# -- routes -------------------------------------------------------------------------------------------


def _public_route(path: str, endpoint: Endpoint, method: str) -> Route:
    """A route without login."""

    async def handle(http_request: Request) -> Response:
        return await endpoint(http_request.scope[_REQUEST_KEY])

    return Route(PATH + path, handle, methods=[method])


def _page_route(path: str, endpoint: Endpoint) -> Route:
    """A route that needs a session and changes nothing."""

    async def guarded(request: AdminRequest) -> Response:
        return await endpoint(request) if request.session is not None else _to_login(request)

    return _public_route(path, guarded, "GET")


def _form_route(path: str, endpoint: Endpoint, role: Role = Role.VIEWER) -> Route:
    """A route for a form that needs a session and its CSRF token, and perhaps an operator's."""

    async def guarded(request: AdminRequest) -> Response:
        if request.session is None:
            raise PageError(403, "You are not logged in", "Your session has ended. Log in and try again.")
        await request.read_form()
        request.check_csrf_token()
        if role is Role.OPERATOR and request.required_session.role is not Role.OPERATOR:
            raise PageError(403, "You may only read", "FIRSTCLAIM_ADMIN_OPERATORS names those who may replay.")
        return await endpoint(request)

    return _public_route(path, guarded, "POST")


def _to_login(request: AdminRequest) -> Response:
    query = request.http_request.scope["query_string"].decode("latin-1")
    where = quote(request.path, safe="/:") + (f"?{query}" if query else "")
    if request.http_request.headers.get("sec-fetch-site") == "cross-site":
        # A browser that follows a link of another site sends no Strict cookie. It does when one of our pages leads to
        # the address.
        return request.render("redirect.html", where=where)
    return request.redirect(Login.address(request, where))


async def _static_file(request: AdminRequest) -> Response:
    response = static(request.http_request.path_params["name"])
    if response is None:
        raise _http_error(404)  # not an HTTPException: the router would answer that itself
    return response
