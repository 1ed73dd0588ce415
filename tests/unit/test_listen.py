"""The listening socket: which addresses reach it, how long an idle connection stays, and what it cannot listen on."""

import socket
from typing import cast

import pytest
from starlette.applications import Starlette

from firstclaim.errors import ConfigurationError
from firstclaim.server.runner import listen, server_config
from firstclaim.settings import Settings


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")


@ipv6
@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
def test_two_colons_are_both_families(client: str) -> None:
    """A client of either family reaches a service that listens on `::`."""
    with listen("::", 0) as listener:
        socket.create_connection((client, listener.getsockname()[1]), timeout=5).close()


@ipv6
def test_one_address_is_one_address() -> None:
    """A service on the loopback of IPv6 is not reached over IPv4."""
    with listen("::1", 0) as listener, pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=5)


def test_a_port_in_use_is_named() -> None:
    """What cannot be listened on is an error that names host and port."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1 port {port}: "):
            listen("127.0.0.1", port)


def test_idle_connections_stay_open_as_long_as_set() -> None:
    """The setting is the server's timeout: a balancer that keeps connections longer would use closed ones."""
    settings = Settings(keepalive_seconds=620)
    assert server_config(lambda: cast(Starlette, None), settings).timeout_keep_alive == 620
