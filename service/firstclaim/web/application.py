"""The paths of the service: the webhook directly, all others through Starlette.

Guarantees: a path is served only as it is written, whatever prefix it is below: a proxy's rule for a path is not
bypassed by another spelling of it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan, Receive, Scope, Send

from firstclaim.errors import Rejected
from firstclaim.observability import metrics
from firstclaim.web.answers import rejection
from firstclaim.web.webhook import WEBHOOK_PATH, Webhook


class Application(Starlette):
    """Starlette's routes, except that a delivery goes straight to its webhook and skips Starlette's middleware.

    `webhooks`: by the endpoint's name, which is the last part of its path; None: the endpoint at `webhook_path` itself.

    A path is served only as it is written here: one with percent-encoding is a 404. A trailing slash makes no
    difference to the webhook and the admin page. To the others it does, or a proxy's rule for exactly `/metrics` would
    not apply to `/metrics/`.

    The paths may be below a prefix: below the one that this application is mounted at, and below `root_path`, whether
    or not a proxy has removed that one. The pages learn both as the scope's `root_path`.

    The middleware took a sixth of the cost of a duplicate. The webhook does not need it: it answers every error itself.
    """

    def __init__(
        self,
        webhooks: Mapping[str | None, Webhook],
        routes: Sequence[BaseRoute],
        lifespan: Lifespan[Starlette] | None,
        *,
        webhook_path: str = WEBHOOK_PATH,
        root_path: str = "",
    ) -> None:
        self._webhooks = {
            path + slash: webhook
            for name, webhook in webhooks.items()
            for path in (webhook_path if name is None else f"{webhook_path}/{name}",)
            for slash in ("", "/")
        }
        # The fallbacks answer other methods on these paths with 405.
        fallbacks = [Route(path, webhook, methods=["POST"]) for path, webhook in self._webhooks.items()]
        self._refuse_path = partial(refuse_path, webhook_path if None in webhooks else None)
        super().__init__(
            routes=[*fallbacks, *routes],
            lifespan=lifespan,
            exception_handlers={404: self._refuse_path, 405: self._refuse_path},
        )
        self.router.redirect_slashes = False  # Stripe counts a redirect as a failed delivery
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        mounted_at = scope.get("root_path", "")
        prefix = mounted_at + self._root_path
        path = _below(self._root_path, _below(mounted_at, scope["path"])) if prefix else scope["path"]
        if _has_escape(scope, path):
            await self._refuse_escape({**scope, "root_path": prefix}, path, receive, send)
        elif scope["method"] == "POST" and (webhook := self._webhooks.get(path)) is not None:
            await webhook(scope, receive, send)
        else:
            await super().__call__({**scope, "root_path": prefix, "path": prefix + path}, receive, send)

    async def _refuse_escape(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        """A path in another spelling is a 404. Below the page's path, the page answers: it has none of this name."""
        if path.startswith("/admin/") and b"/admin/" in _raw_path(scope):
            await super().__call__({**scope, "path": f"{scope['root_path']}/admin/%"}, receive, send)
            return
        response = await self._refuse_path(Request(scope), HTTPException(HTTPStatus.NOT_FOUND))
        await response(scope, receive, send)


async def refuse_path(webhook_path: str | None, _request: Request, error: Exception) -> Response:
    """The responses for 404 and 405, with the same JSON fields as all others. A 405 keeps its header `Allow`.

    Your own path may be secret, so the response names only the default, if that is an endpoint. Names are never shown.
    """
    status = error.status_code if isinstance(error, HTTPException) else 404
    hint = f": webhooks go to POST {WEBHOOK_PATH}" if webhook_path == WEBHOOK_PATH else ""
    reason = "Method not allowed" if status == 405 else f"No such path{hint}"
    metrics.rejected["path"].inc()
    body = rejection(Rejected("path", reason, status)).body
    return Response(body, status, getattr(error, "headers", None), media_type="application/json")


def _below(prefix: str, path: str) -> str:
    """The rest of the path, if it is below the prefix; else the path."""
    rest = path.removeprefix(prefix) if prefix else path
    return rest if rest.startswith("/") else path


def _has_escape(scope: Scope, path: str) -> bool:
    """Whether the path was sent in another spelling than `path`.

    None of our paths needs an escape. The router compares decoded paths, so a proxy's rule for `/metrics` would not
    apply to `/%6detrics`, which leads to the same page. (The prefix is not ours: it may have escapes.)
    """
    return "%" in path or not _raw_path(scope).endswith(path.encode(errors="replace"))


def _raw_path(scope: Scope) -> bytes:
    raw: bytes = scope.get("raw_path") or scope["path"].encode(errors="replace")
    return raw
