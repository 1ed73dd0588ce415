"""The `firstclaim` command: parses, calls, prints; decides nothing.

Exit codes: 0 done · 1 the command ran and its answer is no (`send` or `load` saw an event processed twice) · 2 the
command line, a setting or a handler module is wrong · 3 a store is away, unsuited, or not migrated.
"""

import asyncio
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast

import typer
import uvicorn
from rich.text import Text
from starlette.applications import Starlette
from uvicorn.supervisors import Multiprocess

from firstclaim import sending
from firstclaim.app import create_app
from firstclaim.cli import events, reconcile
from firstclaim.cli.terminal import database, dsn_of, out, read_settings, reported
from firstclaim.embedded.data_folder import kept_secret, running_database, servers
from firstclaim.errors import ConfigurationError
from firstclaim.loadtest import runner
from firstclaim.loadtest.plan import IN_FLIGHT_MOST, Plan
from firstclaim.migrations import schema
from firstclaim.observability import metrics
from firstclaim.passwords import make_hash
from firstclaim.server.connection_limiter import ConnectionLimiter, affordable_connections
from firstclaim.server.preflight import Check, Verdict, all_checks, refuse
from firstclaim.server.protocol import HttpProtocol
from firstclaim.settings import Settings
from firstclaim.urls import postgres_dsn
from firstclaim.web.webhook import WEBHOOK_PATH

app = typer.Typer(
    name="firstclaim",
    help="Receives Stripe webhooks and dispatches each event once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
epoch = typer.Typer(no_args_is_help=True, help="The ledger's epoch, which every marker in Redis carries.")
app.add_typer(epoch, name="epoch")
app.add_typer(events.app, name="events")
app.command()(events.stats)
app.command()(reconcile.reconcile)

_URL = f"http://127.0.0.1:8000{WEBHOOK_PATH}"
# How long a worker may be silent before its supervisor kills it. uvicorn's 5 s also killed workers that were still
# starting, on a busy machine again and again; but a SIGTERM waits behind this, so not much longer than a start takes.
_WORKER_SILENT_SECONDS = 20
_BODIES_ARRIVING_MOST = 64  # of the largest size, at once in memory; of an ordinary one some ten thousand
_KEEP_ALIVE_SECONDS = 75  # longer than a load balancer's idle timeout (60 s is common), or it meets closed sockets


def main() -> None:
    """The console script."""
    sys.path.insert(0, os.getcwd())  # handler modules beside you, as `python -m` would find them
    app()


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"firstclaim {version('firstclaim')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 1,
    migrate: Annotated[bool, typer.Option("--migrate", help="Bring the schema up to date first.")] = False,
) -> None:
    """Serve POST /webhooks/stripe, /livez and /readyz until SIGTERM."""
    with reported():
        settings = read_settings()
        _stop_on_signals()
        listener = _listen(host, port)
        with servers(settings) as ready:
            found = asyncio.run(all_checks(ready, patient=True))
            if migrate or settings.embedded_database:
                refuse([check for check in found if check.name != "schema"])
                _migrate(ready)
                found = asyncio.run(all_checks(ready))
            refuse(found)
            _greet(settings, ready, listener, workers)
            _print_checks([check for check in found if check.verdict is not Verdict.OK])
            _run(ready, listener, workers)


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date; safe to run from many places at once."""
    with reported(), database() as settings:
        _migrate(settings)


@app.command()
def check() -> None:
    """Check configuration, handlers and both stores, a line each; changes nothing."""
    with reported(), servers(read_settings(), share=True) as settings:
        found = asyncio.run(all_checks(settings))
        _print_checks(found)
        if any(each.verdict is Verdict.FAIL for each in found):
            raise typer.Exit(2 if any(each.fatal and each.name == "handlers" for each in found) else 3)


@app.command("admin-password")
def admin_password() -> None:
    """Ask for a password, and print the hash that stands for it in FIRSTCLAIM_ADMIN_PASSWORD."""
    password: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    try:
        typer.echo(make_hash(password))
    except ValueError as error:
        raise typer.BadParameter(f"the password {error}") from None


@epoch.command()
def rotate() -> None:
    """Make every marker in Redis worthless: the step after restoring the ledger from a backup."""
    with reported(), database() as settings:
        before, after = asyncio.run(events.on(settings, lambda operations: operations.rotate_epoch(events.operator())))
        out.print(f"epoch {before} -> {after}; running services notice within one recovery round", soft_wrap=True)


@app.command()
def dashboard(
    print_it: Annotated[bool, typer.Option("--print", help="Print it, to be imported by Grafana.")] = False,
    alerts: Annotated[bool, typer.Option("--alerts", help="The alert rules, for Prometheus, instead.")] = False,
) -> None:
    """The Grafana dashboard that ships with this service, or its Prometheus alert rules."""
    if not print_it:
        raise typer.BadParameter("say --print: nothing is installed anywhere")
    name = "alerts.yaml" if alerts else "dashboard.json"
    out.file.write(resources.files("firstclaim").joinpath("observability", name).read_text())


@app.command()
def send(
    event_type: Annotated[str, typer.Argument(metavar="TYPE", help="Event type, e.g. invoice.payment_failed.")] = "",
    copies: Annotated[int, typer.Option(min=1, max=10_000, help="Copies, all in flight at once.")] = 1,
    url: Annotated[str, typer.Option(help="Where to.")] = _URL,
    event_id: Annotated[str, typer.Option("--id", help="Event id; default: a fresh one.")] = "",
    file: Annotated[Path | None, typer.Option(help="Send this event instead of a template.")] = None,
) -> None:
    """Sign and send an event as Stripe would; exit 1 if more than one copy was processed."""
    if bool(event_type) == (file is not None):
        raise typer.BadParameter("name an event TYPE, or give one with --file")
    with reported():
        with _arguments():
            sending.check_url(url)
            body = _event(event_type, event_id, file)
        with sending.progress(copies, out) as on_answer:
            answers = asyncio.run(sending.send(url, body, _secret(), copies, on_answer))
        sending.report(answers, out)
        raise typer.Exit(sending.exit_code(answers))


def _percent(text: str) -> Any:
    return typer.Option(min=0, max=100, metavar="PERCENT", help=text)


@app.command()
def load(
    url: Annotated[str, typer.Option(help="Where to.")] = _URL,
    users: Annotated[int, typer.Option(min=1, max=IN_FLIGHT_MOST, help="Each has one event under way at a time.")] = 20,
    rate: Annotated[float, typer.Option(min=0, help="Deliveries per second, of all users; 0: all they can.")] = 0,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 10,
    duplicates: Annotated[
        float, _percent("Of the events, how many are sent a second time, 1 to 1000 events later.")
    ] = 20,
    concurrent_duplicates: Annotated[
        float, _percent("Of the events, how many are sent as several copies, all in flight at the same instant.")
    ] = 50,
    copies: Annotated[int, typer.Option(min=2, max=100, help="How many copies that is.")] = 5,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="An event type; again for more.", show_default="all with templates"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the sequence of events.", show_default="random")] = None,
    secret: Annotated[str, typer.Option(help="Signing secret.", show_default="the one that serve uses here")] = "",
    database_url: Annotated[
        str, typer.Option(help="Postgres for the verdict.", show_default="the one that serve uses here")
    ] = "",
    settle: Annotated[float, typer.Option(min=0, help="Seconds that unfinished events are given at the end.")] = 60,
    html: Annotated[Path | None, typer.Option(help="Write locust's report, with charts, to this file.")] = None,
) -> None:
    """Load a service with signed events of mixed types, and judge what became of each.

    For the verdict it has to run with FIRSTCLAIM_HANDLERS=firstclaim.handlers.load_probe. An event may be drawn both
    for a second time and for several copies; second times that would come after the end are left out. At a fixed rate,
    latency counts from the instant at which a delivery was due.

    Exit code 1 if an event was lost or doubled, is not settled in time, or if none was accepted.
    """
    with reported():
        settings = read_settings(receiving=False)
        plan = Plan(
            url=url,
            secret=secret or _secret(),
            types=tuple(types or sending.shipped_types()),
            users=users,
            deliveries_per_second=rate,
            duration_seconds=duration,
            duplicates_percent=duplicates,
            concurrent_percent=concurrent_duplicates,
            copies=copies,
            seed=random.getrandbits(32) if seed is None else seed,
            html=None if html is None else str(html.resolve()),
        )
        if database_url:
            with _arguments():
                dsn: str | None = postgres_dsn(database_url)
        else:
            dsn = dsn_of(settings) if settings.database_url else running_database(settings)
        raise typer.Exit(runner.run(plan, dsn, settle, out))


@contextmanager
def _arguments() -> Iterator[None]:
    """A `ValueError` in the block is about the command line."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error


def _event(event_type: str, event_id: str, file: Path | None) -> bytes:
    if file is not None:
        return sending.read_event(file, event_id or None)
    return sending.build_event(event_type, event_id or None)


def _secret() -> str:
    settings = read_settings()
    if settings.stripe_webhook_secrets:
        return settings.stripe_webhook_secrets[0].get_secret_value()
    if (kept := kept_secret(settings)) is not None:
        return kept
    raise ConfigurationError(
        [f"no signing secret: set STRIPE_WEBHOOK_SECRETS, or start `firstclaim serve` on {settings.data_dir} first"]
    )


# -- shared -------------------------------------------------------------------------------------------


def _migrate(settings: Settings) -> None:
    before, after = asyncio.run(schema.migrate(dsn_of(settings), settings.postgres_timeout_seconds))
    if before != after:
        out.print(f"schema {before or 'empty'} -> {after}")
    else:
        out.print(f"schema {after}, up to date")


def _print_checks(found: list[Check]) -> None:
    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    for each in found:
        line = Text.assemble((f"{each.verdict:6}", colours[each.verdict]), f"{each.name:20} ", each.detail)
        out.print(line, soft_wrap=True)


def _greet(settings: Settings, ready: Settings, listener: socket.socket, workers: int) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    lines = {
        "webhooks": f"POST http://{host}:{port}{WEBHOOK_PATH}",
        "workers": str(workers),
        "postgres": "DATABASE_URL" if settings.database_url else f"embedded, in {settings.data_dir}",
        "redis": "REDIS_URL" if settings.redis_url else "embedded Valkey",
    }
    if settings.admin_password is not None:
        lines["page"] = f"http://{host}:{port}/admin"
    if not settings.stripe_webhook_secrets:
        secret = ready.stripe_webhook_secrets[0].get_secret_value()
        lines["secret"] = f"{secret} (generated, kept in {settings.data_dir})"
        lines["try"] = "firstclaim send invoice.payment_failed --copies 20"
    out.print(f"firstclaim {version('firstclaim')}")
    for name, value in lines.items():
        out.print(f"[bold]{name:10}[/]{value}", soft_wrap=True)  # a secret in two lines cannot be copied


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything is started, so that a port in use costs nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError([f"cannot listen on {host} port {port}: {error.strerror or error}"]) from error
    listener.set_inheritable(True)
    return listener


def _stop_on_signals() -> None:
    """Leave through every `finally`: the embedded servers stop with the service, also on SIGTERM."""

    def leave(_signum: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # once is enough: the second must not interrupt the stopping
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def server_config(application: Callable[[], Starlette], settings: Settings, workers: int) -> uvicorn.Config:
    """uvicorn as `serve` runs it, whatever `application` makes."""
    lobby = ConnectionLimiter(affordable_connections(settings), _BODIES_ARRIVING_MOST * settings.body_most_bytes)
    reading_and_answering = settings.body_timeout_seconds + settings.answer_budget_seconds + 1
    return uvicorn.Config(
        application,
        factory=True,
        workers=workers,
        loop="uvloop",
        # All that is asked of it is to make one.
        http=cast(type[asyncio.Protocol], partial(HttpProtocol, lobby, settings.body_timeout_seconds)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_worker_healthcheck=_WORKER_SILENT_SECONDS,
        timeout_graceful_shutdown=max(1, int(min(reading_and_answering, settings.shutdown_seconds / 2))),
    )


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """Where the workers count, so that each of them can tell the sum."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="firstclaim-metrics-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigurationError(
            [f"several workers need a writable folder for temporary files, e.g. a tmpfs at /tmp: {error.strerror}"]
        ) from error
    with folder as path:
        os.environ[metrics.FOLDER] = path
        yield


def _run(settings: Settings, listener: socket.socket, workers: int) -> None:
    config = server_config(partial(create_app, settings), settings, workers)
    if workers > 1:
        with _shared_metrics():
            Multiprocess(config, sockets=[listener]).run()
    else:
        uvicorn.Server(config).run(sockets=[listener])
