"""`firstclaim livez`: it asks the address at which `serve` listens, and detects what is not alive."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from firstclaim.cli import livez
from firstclaim.listening import DEFAULT_PORT
from firstclaim.settings import Settings, environment_name

ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"PORT": "5000"},
    {"PORT": "5000", "FIRSTCLAIM_PORT": "6000"},
    {"PORT": "5000", "FIRSTCLAIM_PORT": "tcp://10.0.0.1:80"},
    {"PORT": "", "FIRSTCLAIM_PORT": "", "FIRSTCLAIM_HOST": ""},
    {"FIRSTCLAIM_HOST": "0.0.0.0"},  # noqa: S104
    {"FIRSTCLAIM_HOST": "::", "PORT": "80"},
    {"FIRSTCLAIM_HOST": "[::1]"},
    {"FIRSTCLAIM_HOST": "shop.internal"},
]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the settings of the environment that runs the tests, and not in a container of ours."""
    for field in Settings.model_fields:
        monkeypatch.delenv(environment_name(field), raising=False)
    monkeypatch.setattr(livez, "_options_of_process_1", list)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_it_reads_the_variables_as_the_settings_do(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """The address that it reads by itself, to be quick, is the one of the settings."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    host, port = livez.address(environment, [])
    host = f"[{host}]" if ":" in host else host
    assert f"http://{host}:{port}/webhooks/stripe" == Settings().webhook_url
    assert livez.address({}, [])[1] == DEFAULT_PORT


@pytest.mark.parametrize(
    ("options", "address"),
    [
        (["serve", "--host", "::", "--port", "9000"], ("::1", 9000)),
        (["serve", "--port=9000", "--migrate"], ("127.0.0.1", 9000)),
        (["serve", "--port", "1", "--port", "9000"], ("127.0.0.1", 9000)),
        (["serve", "--port"], ("127.0.0.1", 5000)),
    ],
)
def test_options_of_the_container_count(options: list[str], address: tuple[str, int]) -> None:
    """`docker run firstclaim serve --port 9000` is checked at port 9000."""
    assert livez.address({"PORT": "5000"}, options) == address


@contextmanager
def _answering(line: bytes) -> Iterator[int]:
    """A server on a free port that answers one request with this line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(4096)
                connection.sendall(line if request.startswith(b"GET /livez HTTP/1.1\r\n") else b"HTTP/1.1 404 No\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", 0),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 1),
        (b"", 1),
        (b"SSH-2.0-OpenSSH\r\n", 1),
    ],
)
def test_only_a_200_is_alive(monkeypatch: pytest.MonkeyPatch, line: bytes, code: int) -> None:
    """The exit code is 0 for a 200 and 1 for anything else."""
    with _answering(line) as port:
        monkeypatch.setenv("PORT", str(port))
        assert livez.livez() == code


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is not alive."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("PORT", str(port))
    assert livez.livez() == 1
