"""One request to the admin page: its session, its address, its form.

Guarantees: a form is read only up to `FORM_MOST_BYTES`, and only with the content type of our forms. Two checks ensure
that a form came from one of our own pages: it must have the session's CSRF token, and the origin that the browser
reports (`Origin`, `Sec-Fetch-Site`) must be this address.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from firstclaim.admin.identity import Role
from firstclaim.admin.rendering import Templates
from firstclaim.admin.session import Cookie, Session, Signer
from firstclaim.operations.limits import TEXT_MOST_CHARACTERS, is_storable

PATH: Final = "/admin"
FORM_MOST_BYTES: Final = 512 * 1024  # a thousand events with the longest ids
LOGIN_MOST_BYTES: Final = 8 * 1024
FIELDS_MOST: Final = 1100
_NOTICE_SECONDS = 60
_FORM = "application/x-www-form-urlencoded"


class PageError(Exception):
    """Ends the request with an error page."""

    def __init__(self, status: int, title: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(title)
        self.status = status
        self.title = title
        self.text = text
        self.headers = dict(headers or {})


@dataclass(slots=True)
class AdminRequest:
    """One request. `address` is the client's; `secure` is whether cookies are for TLS only."""

    http_request: Request
    templates: Templates
    signer: Signer
    address: str
    secure: bool
    session: Session | None = None
    form: dict[str, list[str]] = field(default_factory=dict)
    set_cookies: list[str] = field(default_factory=list)

    # -- cookies --------------------------------------------------------------------------------------

    def cookie(self, name: str) -> Cookie:
        """The cookie of that name, for this request with or without TLS."""
        return Cookie(name, self.secure, self.http_request.scope.get("root_path", ""))

    def cookie_value(self, name: str) -> str | None:
        """The value of that cookie in the request."""
        return self.http_request.cookies.get(self.cookie(name).full_name)

    @property
    def required_session(self) -> Session:
        """The session. Raises `PageError` if there is none."""
        if self.session is None:
            raise PageError(403, "You are not logged in", "Log in and try again.")
        return self.session

    @property
    def operator(self) -> str:
        """Who makes this request, for the audit: the user whom a proxy named, or only where from."""
        user = self.required_session.user
        return f"admin page from {self.address}" if user is None else f"{user} (admin page from {self.address})"

    @property
    def home(self) -> str:
        """The address of the page: `PATH`, below the prefix that the application has."""
        return quote(self.http_request.scope.get("root_path", ""), safe="/:@~") + PATH

    @property
    def path(self) -> str:
        """The path. Not from `http_request.url`, which depends on the header Host, which can hold anything."""
        path: str = self.http_request.scope["path"]
        return path

    def notice(self, text: str, *, success: bool = True) -> None:
        """Show a notice once, on the next page."""
        signed = self.signer.sign_value(self.required_session, "notice", [text, success])
        self.set_cookies.append(self.cookie("notice").set(signed, _NOTICE_SECONDS))

    def _take_notice(self) -> tuple[str, bool] | None:
        if self.session is None or (signed := self.cookie_value("notice")) is None:
            return None
        self.set_cookies.append(self.cookie("notice").drop())
        content = self.signer.verify_value(self.session, "notice", signed, _NOTICE_SECONDS)
        return None if content is None else (str(content[0]), bool(content[1]))

    # -- parameters and fields ------------------------------------------------------------------------

    def query_value(self, name: str) -> str | None:
        """A query parameter, or None if it is empty. Raises `PageError` if the ledger cannot have such a value."""
        return _search_text(self.http_request.query_params.get(name, ""))

    def query_values(self, name: str) -> list[str]:
        """All values of a query parameter that are not empty."""
        values = map(_search_text, self.http_request.query_params.getlist(name))
        return [value for value in values if value is not None]

    def form_value(self, name: str) -> str:
        """A field of the form; empty if there is none of that name."""
        return self.form.get(name, [""])[0]

    # -- responses ------------------------------------------------------------------------------------

    def render(self, template: str, status_code: int = 200, **values: Any) -> Response:
        """A page, with the values that all pages need."""
        session = self.session
        shared = {
            "path": self.home,
            "current_path": quote(self.path, safe="/:@~"),
            "token": None if session is None else self.signer.csrf_token(session),
            "notice": self._take_notice(),
            "user": None if session is None else session.user,
            "role": None if session is None else session.role,
            "is_operator": session is not None and session.role is Role.OPERATOR,
        }
        return self.templates.render(template, {**shared, **values}, status_code)

    def redirect(self, address: str) -> Response:
        """Redirect after a form, so that a reload does not send the form again."""
        return RedirectResponse(address, 303)

    # -- the form -------------------------------------------------------------------------------------

    async def read_form(self, most_bytes: int = FORM_MOST_BYTES) -> None:
        """Read the form into `form`. Raises `PageError`, and starlette's ClientDisconnect."""
        self._check_origin()
        if self.http_request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
            raise PageError(415, "Not a form", f"The content type of a form is {_FORM}.")
        body = bytearray()
        async for chunk in self.http_request.stream():
            body += chunk
            if len(body) > most_bytes:
                raise PageError(
                    413, "The form is too large", f"A form has at most {most_bytes} bytes.", {"Connection": "close"}
                )
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MOST, errors="strict")
        except ValueError:  # also for what is not UTF-8
            raise PageError(400, "Not a form", "The form cannot be parsed.") from None
        for name, value in pairs:
            self.form.setdefault(name, []).append(value)

    def check_csrf_token(self) -> None:
        """Raise `PageError` unless the form has the session's CSRF token."""
        if not self.signer.is_csrf_token(self.required_session, self.form_value("token")):
            raise PageError(403, "Not from this page", "The form belongs to another session. Load the page again.")

    def _check_origin(self) -> None:
        fetch_site = self.http_request.headers.get("sec-fetch-site", "same-origin")
        origin = self.http_request.headers.get("origin")
        if fetch_site != "same-origin" or (origin is not None and not self._is_ours(origin)):
            text = (
                "Your browser reports that another site sent this. A proxy in front of this page must not change Host."
            )
            raise PageError(403, "Not from this page", text)

    def _is_ours(self, origin: str) -> bool:
        try:
            parsed = urlsplit(origin)
        except ValueError:
            return False
        is_host = parsed.netloc.lower() == self.http_request.headers.get("host", "").lower()
        return is_host and (parsed.scheme == "https" or not self.secure)


def own_address(text: str, under: str) -> str:
    """`text` if it is the address `under` or an address below it, otherwise `under`."""
    is_under = text == under or text.startswith((f"{under}/", f"{under}?"))
    return text if is_under and text.isprintable() and text.isascii() and "\\" not in text else under


def is_loopback(host: str) -> bool:
    """Whether a header `Host` names the machine that the browser runs on."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def client_address(peer: str | None, forwarded: Sequence[str], proxies: int) -> str:
    """The client's address behind that many trusted proxies: that entry of `X-Forwarded-For`, counted from the end."""
    entries = [entry.strip() for header in forwarded for entry in header.split(",")]
    if 0 < proxies <= len(entries):
        with_port = entries[-proxies].rpartition(":")
        for text in (entries[-proxies], with_port[0]):  # some proxies append a port
            try:
                return str(ipaddress.ip_address(text.strip("[]")))
            except ValueError:
                continue
    return peer or "unknown"


def _search_text(text: str) -> str | None:
    text = text.strip()
    if not text:
        return None
    if not is_storable(text):
        message = f"Search for up to {TEXT_MOST_CHARACTERS} printable characters."
        raise PageError(400, "The search text is not valid", message)
    return text
