"""The settings of HTTP: where the service listens, below which paths, and the limits of connections and bodies.

Guarantees: every path is one that a proxy, a browser and a log line take as it is written. What Kubernetes sets for a
Service named firstclaim is not taken for a setting.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings

DEFAULT_PORT = 8000

_LINKED_PORT = re.compile(r"(?:tcp|udp|sctp)://.*")
_HOST = re.compile(r"[A-Za-z0-9.:%_\-]{1,255}")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~\-]+)+")
_OTHER_PATHS = ("/livez", "/readyz", "/metrics", "/admin")


def _not_a_service_link(value: object) -> object:
    """For a Service named firstclaim, Kubernetes sets FIRSTCLAIM_PORT=tcp://10.0.0.1:80: that is not our setting."""
    return None if isinstance(value, str) and _LINKED_PORT.fullmatch(value) else value


def _plain_path(text: str) -> str:
    """A path without escapes or a trailing slash. Raises ValueError."""
    path = text.rstrip("/")
    if (path and not _PATH.fullmatch(path)) or ".." in path.split("/"):
        raise ValueError("expected a path that begins with /, of letters, digits and . _ ~ -, e.g. /pay")
    return path


def _webhook_path(text: str) -> str:
    path = _plain_path(text)
    if not path or path in _OTHER_PATHS or path.startswith("/admin/"):
        raise ValueError(f"expected a path other than {', '.join(('/', *_OTHER_PATHS))}, e.g. /webhooks/stripe")
    return path


def _host(text: str) -> str:
    host = text.removeprefix("[").removesuffix("]")
    if not _HOST.fullmatch(host):
        raise ValueError("expected an address or a host name, e.g. 0.0.0.0 or ::")
    return host


class Listening(BaseSettings):
    """Address, paths and limits. A part of `firstclaim.settings.Settings`."""

    host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1",
        description="Address to listen on. `0.0.0.0`: all IPv4 addresses. `::`: all IPv4 and IPv6 addresses.",
    )
    port: Annotated[int | None, BeforeValidator(_not_a_service_link)] = Field(
        None, ge=0, le=65_535, description="Port to listen on; 0 picks a free one. Unset: `PORT`, or else 8000."
    )
    platform_port: int | None = Field(
        None,
        ge=1,
        le=65_535,
        validation_alias="PORT",
        description="Set by Heroku, Cloud Run, Render and others. `FIRSTCLAIM_PORT` and `--port` override it.",
    )
    workers: int = Field(1, ge=1, le=64, description="Worker processes. One is enough where you scale by replicas.")
    webhook_path: Annotated[str, AfterValidator(_webhook_path)] = Field(
        "/webhooks/stripe", description="Path of the endpoint. A trailing slash in a request makes no difference."
    )
    root_path: Annotated[str, AfterValidator(_plain_path)] = Field(
        "", description="Prefix of all paths, as clients see them, whether or not your proxy removes it."
    )
    keepalive_seconds: float = Field(
        75,
        ge=1,
        le=3600,
        description="How long an idle connection stays open: longer than at your balancer (AWS: 60 s, Google: 600 s).",
    )

    connections_most: int = Field(
        2000,
        ge=10,
        le=100_000,
        description="Connections per process. At the limit, the one with the longest incomplete request is closed.",
    )
    body_most_bytes: int = Field(
        1024 * 1024, ge=1024, description="A larger body is answered with 413. Stripe publishes no maximum."
    )
    body_timeout_seconds: float = Field(
        5, gt=0, le=60, description="A body that takes longer to arrive is answered with 408."
    )

    @property
    def listen_port(self) -> int:
        """The port to listen on; 0 for any."""
        return next((port for port in (self.port, self.platform_port) if port is not None), DEFAULT_PORT)

    @property
    def webhook_url(self) -> str:
        """The endpoint's address on this machine."""
        return f"http://{_loopback_of(self.host)}:{self.listen_port}{self.root_path}{self.webhook_path}"


def _loopback_of(host: str) -> str:
    """The host of a URL that reaches, from this machine, a service that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host
