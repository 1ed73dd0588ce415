"""What all URLs have in common: how they are split, and what is wrong with them before their parts are looked at.

Guarantees: no message repeats any part of a URL except its scheme, so no password can get into a log.
"""

import re
from collections.abc import Iterable, Mapping
from urllib.parse import SplitResult

# RFC 3986, appendix B: every text matches.
_URL = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:]+)(?::([0-9]*))?")
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_MOST_PORT = 65_535


def split(url: str) -> SplitResult:
    """As `urlsplit`, which refuses the IPv6 address of one of several hosts, and brackets in a password."""
    scheme, *others = _URL.findall(url)[0]
    return SplitResult(scheme.lower(), *others)


def escaped_login(netloc: str) -> str:
    """`netloc` with what the libraries of others misread in the user's name and password escaped: @, [ and ]."""
    user, found, hosts = netloc.rpartition("@")
    return user.replace("@", "%40").replace("[", "%5B").replace("]", "%5D") + found + hosts


def split_url(url: str, example: str) -> SplitResult:
    """`url` without surrounding white space, split. Raises ValueError with what is expected."""
    text = url.strip()
    if text[:1] in _QUOTES or text[-1:] in _QUOTES:
        raise ValueError("remove the quotes around the URL: they were not taken off, and count as a part of it")
    scheme, found, _ = text.partition("://")
    if not found:
        raise ValueError(f"not a URL; expected e.g. {example}")
    if re.search(r"[\s=]", scheme):
        raise ValueError("expected the URL alone, without the command or the name that is before it")
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise ValueError("the URL holds white space or a control character: remove it, or write %20")
    parts = split(text)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme):
        raise ValueError(f"not a URL; expected e.g. {example}")
    # An unescaped # ? or / in a password ends the host part early. The rest of the password, and the real host, would
    # then be used, or shown, as a different part of the URL.
    cut_short = parts.netloc and "@" not in parts.netloc and "@" in parts.path + parts.query.partition("=")[0]
    if "#" in text and "@" not in text.partition("#")[2]:
        raise ValueError("remove the # and what follows it: no such part of a URL is sent; in a password, write %23")
    if "#" in text or cut_short:
        raise ValueError("a # ? / or @ in the user name or the password must be written %23, %3F, %2F or %40")
    return parts


def split_hosts(netloc: str, example: str) -> tuple[tuple[str, int | None], ...]:
    """The hosts, without the brackets of IPv6, and the ports of `user:password@host:port,host:port`."""
    listed = netloc.rpartition("@")[2]
    if not listed:
        return ()
    hosts = []
    for each in listed.split(","):
        match = _HOST.fullmatch(each)
        if match is None or (match[2] and not 0 < int(match[2]) <= _MOST_PORT):
            raise ValueError(f"not a URL; expected e.g. {example}")
        hosts.append((match[1].strip("[]"), int(match[2]) if match[2] else None))
    return tuple(hosts)


def require_one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is allowed. Raises ValueError with what is, without the value."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(sorted(allowed))}")
    return value


def unreadable_file(parameters: Mapping[str, str], names: Iterable[str]) -> str | None:
    """What is wrong with the first of these parameters whose file cannot be read, without its path; None: nothing."""
    for name in names:
        if path := parameters.get(name):
            try:
                with open(path, "rb"):
                    pass
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "invalid path"
                return f"{name}: its file cannot be read ({reason})"
    return None
