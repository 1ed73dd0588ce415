"""`firstclaim livez`: whether the service on this machine is alive, for a container's health check.

Guarantees: it asks the address that `serve` listens on, as the options and variables of process 1 say. It takes some
tens of milliseconds: it loads neither the settings nor an HTTP client, and reads the three variables itself (a test
compares it with the settings). It never checks a store: a restart of the container would not help.
"""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

_TIMEOUT_SECONDS = 2.0
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def livez() -> int:
    """The exit code: 0 if `/livez` answers with 200, else 1."""
    host, port = address(os.environ, _options_of_process_1())
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = connection.makefile("rb").readline(100)
    except OSError as error:
        print(f"firstclaim: no answer from {host} port {port}: {error}")
        return 1
    print(f"firstclaim: {status.decode(errors='replace').strip()}")
    return 0 if re.match(rb"HTTP/1\.[01] 200 ", status) else 1


def address(environ: Mapping[str, str], options: Sequence[str]) -> tuple[str, int]:
    """The host and the port at which a `serve` with this environment and these options is reached."""
    linked = "://" in environ.get("FIRSTCLAIM_PORT", "")  # set by Kubernetes for a Service named firstclaim
    own_port = None if linked else environ.get("FIRSTCLAIM_PORT")
    host = _option(options, "--host") or environ.get("FIRSTCLAIM_HOST") or "127.0.0.1"
    port = _option(options, "--port") or own_port or environ.get("PORT") or "8000"
    host = host.removeprefix("[").removesuffix("]")
    return _EVERY_ADDRESS.get(host, host), int(port) if port.isdecimal() else 8000


def _options_of_process_1() -> list[str]:
    """The options of `serve`, if it is this container's process 1, or the child of an init process that is."""
    try:
        words = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return words[words.index("serve") :] if "serve" in words else []


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of the option, in either spelling; of several, the last."""
    found = None
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word == name:
            found = following
        elif word.startswith(name + "="):
            found = word.partition("=")[2]
    return found
