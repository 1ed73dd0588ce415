"""The address that notices are sent to: what is refused before anything is sent.

Guarantees: no message repeats any part of the URL. For Slack and its like, the URL's path is the secret.
"""

from firstclaim.urls.parts import escaped_login, split, split_hosts, split_url

_EXAMPLE = "https://hooks.example.com/services/..."


def notify_url(url: str) -> str:
    """`url`, if it is one of HTTP or HTTPS. Raises ValueError."""
    parts = split_url(url, _EXAMPLE)
    split_hosts(parts.netloc, _EXAMPLE)
    if parts.scheme not in ("http", "https"):
        raise ValueError("expected https:// or http://")
    if not parts.hostname or "," in parts.netloc:
        raise ValueError(f"expected a scheme, a host and a path, e.g. {_EXAMPLE}")
    return parts._replace(netloc=escaped_login(parts.netloc)).geturl()


def shown(url: str) -> str:
    """The scheme, the host and the port of a checked `url`, and nothing else of it."""
    parts = split(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
