"""/admin: what may be asked there, and what every answer has in common.

sqladmin 0.32 and starlette-admin 1.0 were tried in a browser under the headers below, and neither fits: sqladmin has
no CSRF token anywhere, logs out and runs its actions by GET, and limits no logins; starlette-admin's `base.html` has
inline scripts and styles and a stylesheet of another host, its CSRF cookie is not HttpOnly and only SameSite=Lax. Both
write rows through the ORM, where here a state may only change as `firstclaim.operations.commands` changes it, so what
they are made for would be switched off; this is some server-rendered pages without any script instead.

Guarantees: everything but the login and the stylesheet needs a session, which is asked for here and not by each page;
every change is a POST that brought the session's token, so GET changes nothing; every answer, an error's too, carries
`HEADERS`; no error shows what went wrong inside, or any of its words.
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

from firstclaim.admin.events import Events
from firstclaim.admin.login import Login
from firstclaim.admin.overview import Overview
from firstclaim.admin.rendering import Pages, static
from firstclaim.admin.replay import Replay
from firstclaim.admin.request import PATH, AdminRequest, Refused, client_address, is_loopback
from firstclaim.admin.session import LASTS_SECONDS, Signer
from firstclaim.errors import LedgerUnavailable, StatementTimeout
from firstclaim.observability.redaction import describe_error

log = structlog.get_logger(__name__)

Answer = Callable[[AdminRequest], Awaitable[Response]]

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",  # no script at all
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser sends `Origin: null` with our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}
_VISIT = "firstclaim.visit"


class AdminPage:
    """The page as one ASGI application; `proxies` as in the settings."""

    def __init__(
        self, signer: Signer, entry: Login, overview: Overview, events: Events, replaying: Replay, proxies: int
    ) -> None:
        self._signer = signer
        self._pages = Pages()
        self._proxies = proxies
        self._router = Router(
            [
                _page("", overview.show),
                _page("/events", events.browse),
                _page("/events/{event_id}", events.show),
                _change("/payload", events.show_payload),
                _change("/replay", replaying.ask),
                _change("/replay/confirmed", replaying.replay),
                _change("/logout", entry.log_out),
                _open("/login", entry.show, "GET"),
                _open("/login", entry.log_in, "POST"),
                _open("/static/{name}", _file, "GET"),
            ],
            redirect_slashes=False,
        )

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """For the application: whatever is asked under `PATH` comes here."""
        return [Route(PATH, self), Route(PATH + "/{rest:path}", self)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, answered in any case."""
        request = Request(scope, receive)
        visit = self._visit(request)
        scope[_VISIT] = visit
        began = False

        async def send_with_headers(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                for cookie in visit.set_cookies:
                    headers.append("Set-Cookie", cookie)
            await send(message)

        try:
            await self._router(scope, receive, send_with_headers)
        except Exception as error:
            if began:
                raise
            await _explain(visit, error)(scope, receive, send_with_headers)

    def _visit(self, request: Request) -> AdminRequest:
        peer = request.client.host if request.client else None
        visit = AdminRequest(
            request=request,
            pages=self._pages,
            signer=self._signer,
            address=client_address(peer, request.headers.getlist("x-forwarded-for"), self._proxies),
            # TLS ends before us, and a header that says so can be forged. What cannot is where the browser takes
            # itself to be: on any name but its own machine's the cookie is for TLS alone, whoever sits in between.
            secure=request.scope["scheme"] == "https" or not is_loopback(request.headers.get("host", "")),
        )
        visit.session = self._signer.read(visit.brought("session"))
        if visit.session is not None and (renewed := self._signer.renewed(visit.session)) is not None:
            visit.set_cookies.append(visit.cookie("session").set(self._signer.write(renewed), LASTS_SECONDS))
        return visit


def _explain(visit: AdminRequest, error: Exception) -> Response:
    """A page for what was raised."""
    match error:
        case Refused():
            refused = error
        case HTTPException():
            refused = _nothing_here(error.status_code, error.headers)
        case ClientDisconnect():
            return Response(status_code=400)  # nobody reads it
        case StatementTimeout():
            text = "It was ended, so that it slows nothing else. Narrow it: by time, by type, by status."
            refused = Refused(503, "That took too long", text)
        case LedgerUnavailable():
            log.warning("admin_without_ledger", error=str(error))
            text = "Postgres is away, or this page's connections to it are all busy. You are still logged in."
            refused = Refused(503, "The ledger cannot be asked", text, {"Retry-After": "5"})
        case _:
            log.error("admin_failed", error=describe_error(error))
            refused = Refused(500, "This page failed", "The log says where. Nothing is known to have been changed.")
    response = visit.page("error.html", refused.status, title=refused.title, text=refused.text, status=refused.status)
    response.headers.update(refused.headers)
    return response


def _nothing_here(status: int, headers: Mapping[str, str] | None = None) -> Refused:
    return Refused(status, HTTPStatus(status).phrase, "There is nothing here.", headers)


# -- routes -------------------------------------------------------------------------------------------


def _open(path: str, answer: Answer, method: str) -> Route:
    """For everybody."""

    async def endpoint(request: Request) -> Response:
        return await answer(request.scope[_VISIT])

    return Route(PATH + path, endpoint, methods=[method])


def _page(path: str, answer: Answer) -> Route:
    """Behind the login; changes nothing."""

    async def guarded(visit: AdminRequest) -> Response:
        return await answer(visit) if visit.session is not None else _to_login(visit)

    return _open(path, guarded, "GET")


def _change(path: str, answer: Answer) -> Route:
    """Behind the login, and only from one of its pages."""

    async def guarded(visit: AdminRequest) -> Response:
        if visit.session is None:
            raise Refused(403, "You are not logged in", "Your login has ended. Log in, and do it again.")
        await visit.read_form()
        visit.check_token()
        return await answer(visit)

    return _open(path, guarded, "POST")


def _to_login(visit: AdminRequest) -> Response:
    query = visit.request.scope["query_string"].decode("latin-1")
    where = quote(visit.path, safe="/:") + (f"?{query}" if query else "")
    if visit.request.headers.get("sec-fetch-site") == "cross-site":
        # By a link from elsewhere, with which a browser sends no Strict cookie: asked for by a page of ours it does.
        return visit.page("again.html", where=where)
    return visit.go(Login.address(where))


async def _file(visit: AdminRequest) -> Response:
    response = static(visit.request.path_params["name"])
    if response is None:
        raise _nothing_here(404)  # no HTTPException: that would be answered before it comes to us
    return response
