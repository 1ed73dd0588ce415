"""`firstclaim serve`: parses, checks, starts the server, and prints its addresses."""

from __future__ import annotations

import itertools
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from firstclaim.cli.environment import read_settings
from firstclaim.cli.terminal import out, print_checks, reported
from firstclaim.errors import ConfigurationError

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Iterator

    from firstclaim.settings import Settings


def serve(
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.", show_default="FIRSTCLAIM_HOST, or 127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port to listen on; 0 picks a free one.",
            show_default="FIRSTCLAIM_PORT, or PORT, or 8000",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Number of worker processes.", show_default="FIRSTCLAIM_WORKERS, or 1"),
    ] = None,
    root_path: Annotated[
        str | None,
        typer.Option(
            metavar="/PREFIX",
            help="Prefix of all paths, removed by your proxy or not.",
            show_default="FIRSTCLAIM_ROOT_PATH, or none",
        ),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Restart whenever a source file changes. For development.")
    ] = False,
    migrate: Annotated[bool, typer.Option("--migrate", help="Migrate the schema first, if it is outdated.")] = False,
) -> None:
    """Receive deliveries at POST /webhooks/stripe until SIGTERM. Also serves /livez, /readyz and /metrics.

    An option overrides its setting.
    """
    import asyncio

    from firstclaim.app import create_app
    from firstclaim.cli.database import migrate_schema
    from firstclaim.embedded.data_folder import servers
    from firstclaim.server.check import Verdict
    from firstclaim.server.preflight import all_checks, raise_if_fatal
    from firstclaim.server.runner import exit_on_signals, listen, run, run_reloading
    from firstclaim.shutdown import Watchdog

    watchdog = Watchdog()
    watchdog.skip_teardown()
    with watchdog.bounded_exit(), reported():
        flags = {"host": host, "port": port, "workers": workers, "root_path": root_path}
        settings = read_settings(flags={name: value for name, value in flags.items() if value is not None})
        if reload and settings.workers > 1:
            raise ConfigurationError(["--reload replaces one process: use it with --workers 1"])
        exit_on_signals()
        listener = listen(settings.host, settings.listen_port)
        with servers(settings) as ready:
            checks = asyncio.run(all_checks(ready, wait=True))
            if migrate or settings.embedded_database:
                raise_if_fatal([check for check in checks if check.name != "schema"])
                migrate_schema(ready)
                checks = asyncio.run(all_checks(ready, wait=True))
            raise_if_fatal(checks)
            _print_addresses(settings, ready, listener)
            print_checks([check for check in checks if check.verdict is not Verdict.OK])
            try:
                if reload:
                    run_reloading(create_app, ready, listener, watchdog)
                else:
                    run(create_app, ready, listener, settings.workers, watchdog)
            finally:
                if ready is not settings:  # there are embedded servers: they stop now, with time limits of their own
                    watchdog.lift()


def _print_addresses(settings: Settings, ready: Settings, listener: socket.socket) -> None:
    out.print(f"firstclaim {version('firstclaim')}")
    host, port = listener.getsockname()[:2]
    for name, value in _lines(settings, ready, host, port):
        # Not as markup: a pattern may have brackets. A secret that is wrapped cannot be copied.
        out.print(Text.assemble((f"{name:10}", "bold"), value), soft_wrap=True)


def _lines(settings: Settings, ready: Settings, host: str, port: int) -> Iterator[tuple[str, str]]:
    """What a service that listens there is made of: names and values. `ready`: with what embedded servers add."""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"
    url = f"{address}{settings.webhook_path}"
    yield from _named("webhooks", (f"POST {url}" if name is None else f"POST {url}/{name}" for name in ready.endpoints))
    yield "workers", str(settings.workers)
    yield from _named("handlers", _handler_lines(settings))
    yield (
        "postgres",
        "DATABASE_URL" if settings.database_url else f"embedded, in {settings.data_dir}: firstclaim psql",
    )
    yield "redis", "REDIS_URL" if settings.redis_url else "embedded Valkey"
    if settings.admin_password is not None:
        yield "admin", f"{address}/admin"
    if not settings.stripe_webhook_secrets:
        secret = ready.stripe_webhook_secrets[0].get_secret_value()
        yield "secret", f"{secret} (generated, stored in {settings.data_dir})"
        if command := _command_to_try(settings, port):
            yield "try", command


def _named(name: str, values: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A line for each value; the name stands at the first."""
    return zip(itertools.chain([name], itertools.repeat("")), values, strict=False)


def _handler_lines(settings: Settings) -> Iterator[str]:
    """A line for each pattern."""
    from firstclaim.registry import Registry

    handlers = sorted(Registry.load(settings.handlers, settings), key=lambda handler: handler.pattern)
    width = max((len(handler.pattern) for handler in handlers), default=0)
    for handler in handlers:
        options = f" ({', '.join(handler.options.words)})" if handler.options.words else ""
        yield f"{handler.pattern:{width}} {handler.name}{options}"


def _command_to_try(settings: Settings, port: int) -> str | None:
    """A command whose event a handler of this service runs at; None: there is none."""
    if (event_type := _handled_type(settings)) is None:
        return None
    mode = " --set livemode=true" if settings.livemode == "live" else ""  # the templates are events of test mode
    return f"firstclaim send {event_type} --copies 20{mode}{_url_option(settings, port)}"


def _handled_type(settings: Settings) -> str | None:
    """A type that `send` has a template for and a handler runs at; None: there is none."""
    from firstclaim.registry import Registry
    from firstclaim.sending.events import shipped_types

    registry = Registry.load(settings.handlers, settings)
    types = ("invoice.payment_failed", *shipped_types())
    return next((each for each in types if registry.find(each) is not None), None)


def _url_option(settings: Settings, port: int) -> str:
    """The option that `send` needs to reach this service; empty where its default, which follows the settings, does."""
    from firstclaim.settings import load_settings

    url = settings.model_copy(update={"port": port}).webhook_url
    return "" if url == load_settings().webhook_url else f" --url {url}"
