"""What the command refuses before it connects to anything: the exit code, the name of what is wrong, and no secret.

The command runs in this process. One real process for each kind of exit is in `tests/acceptance`.
"""

import io
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from firstclaim.cli.commands import app
from firstclaim.cli.replay import _confirm
from firstclaim.cli.serve import _handled_type
from firstclaim.errors import ConfigurationError
from firstclaim.operations.stripe_api import StripeEvents
from firstclaim.settings import Settings, environment_name
from tests.stripe_api import KEY

PASSWORD = "pa55w0rd-in-a-url"
SECRET = "whsec_must_not_be_printed"
USAGE, UNAVAILABLE = 2, 3

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty folder without any setting; returns the exit code and everything it wrote."""
    for field in Settings.model_fields:
        monkeypatch.delenv(environment_name(field), raising=False)
    monkeypatch.delenv("STRIPE_LOG", raising=False)
    monkeypatch.chdir(tmp_path)
    # The runner closes its standard error, which loggers of this process would keep.
    monkeypatch.setattr("firstclaim.observability.logging.configure", lambda *_: None)

    def invoke(*arguments: str, **environment: str | None) -> tuple[int, str]:
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", **environment})
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert PASSWORD not in done.output
        assert SECRET not in done.output
        return done.exit_code, done.output

    return invoke


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of the loopback on which connections wait to be accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def connections(listener: socket.socket) -> int:
    """How many clients connected."""
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return 0
    return 1


def assert_refused(outcome: tuple[int, str], *words: str, code: int = USAGE) -> None:
    """The command ended with this exit code and named all of these words, wherever its lines end."""
    found, output = outcome
    assert found == code, output
    output = " ".join(output.replace("│", " ").split())
    for word in words:
        assert word in output


# -- exit code 2: the command line --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "--older-than", "3 days"], ["--older-than", "90s, 15m, 2h, 3d"]),
        (["list", "--status", "stuck"], ["--status", "pending"]),
        (["list", "--status", "PENDING"], ["--status", "expected pending, processing, ", "not 'PENDING'"]),
        (["list", "--limit", "0"], ["--limit"]),
        (["list", "--type", "task:n*"], ["--type", "expected an event type", "not 'task:n*'"]),
        (["list", "--type", "handler:"], ["--type", "expected an event type", "not 'handler:'"]),
        (["list", "--type", "invoice.*,in voice"], ["--type", "expected an event type", "not 'in voice'"]),
        (["replay", "--type", "invoice*"], ["--type", "expected an event type", "not 'invoice*'"]),
        (["list", "--type", ""], ["--type", "printable characters"]),
        (["show", "evt_\n"], ["printable characters"]),
        (["replay"], ["select events by id"]),
        (["prune", "--row-days", "34"], ["--row-days", "35"]),
        (["prune", "--payload-days", "99999999999"], ["--payload-days", "36500"]),
    ],
)
def test_an_impossible_filter(run: Run, arguments: list[str], words: list[str]) -> None:
    """An option of `events` that cannot be meant: exit 2, with what was wrong and what would be right."""
    outcome = run("events", *arguments)
    assert_refused(outcome, *words)
    assert "Value error" not in outcome[1]  # typer's validator writes it before what it refuses


@pytest.mark.parametrize("command", [["events", "prune"], ["archive", "get", "evt_1"], ["archive", "restore", "evt_1"]])
def test_an_impossible_archive(run: Run, listener: socket.socket, command: list[str]) -> None:
    """An address that is none, or that holds a key: exit 2, before the database is asked, and no key is printed."""
    port = listener.getsockname()[1]
    database = f"postgresql://nobody@127.0.0.1:{port}/x"
    for url, words in (
        ("/srv/archive", ["not a URL", "s3://bucket/prefix"]),
        (f"s3://key:{PASSWORD}@bucket", ["expected no key"]),
        ("gs://bucket", ["expected s3://"]),
    ):
        assert_refused(run(*command, "--archive", url, DATABASE_URL=database), "--archive", *words)
        assert_refused(
            run(*command, DATABASE_URL=database, FIRSTCLAIM_ARCHIVE_URL=url), "FIRSTCLAIM_ARCHIVE_URL", *words
        )
    assert connections(listener) == 0


def test_no_archive(run: Run) -> None:
    """Without an archive, exit 2 says what to set, before anything is looked for in the ledger."""
    for command in (["get", "evt_1", "--received", "2026-08-27"], ["get", "evt_1"], ["restore", "evt_1"]):
        assert_refused(run("archive", *command), "FIRSTCLAIM_ARCHIVE_URL", "--archive")
    said = "expected a day, such as 2026-08-27, not 'yesterday'"
    assert_refused(run("archive", "get", "evt_1", "--received", "yesterday"), "--received", said)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--duplicates", "101"], "--duplicates"),
        (["--users", "500"], "2500 concurrent connections"),
        (["--html", "no/such/folder/r.html"], "--html"),
        (["--database-url", f"mysql://user:{PASSWORD}@localhost/shop"], "mysql"),
    ],
)
def test_an_impossible_load_test(run: Run, arguments: list[str], word: str) -> None:
    """An option of `load` that cannot work: exit 2, the option is named, nothing is sent."""
    outcome = run("load", "--secret", SECRET, *arguments)
    assert_refused(outcome, word)
    assert "deliveries of" not in outcome[1]


def test_a_url_that_is_none(run: Run) -> None:
    """`send` to what cannot be an address: exit 2, and the option is named."""
    assert_refused(run("send", "invoice.paid", "--url", "localhost:8000"), "--url")


def test_nothing_to_print(run: Run) -> None:
    """`dashboard` without --print: exit 2, and the option is named."""
    assert_refused(run("dashboard"), "--print")


@pytest.mark.parametrize(
    ("since", "settings", "words"),
    [
        ("31d", {}, ["--since", "at most 30d", "Stripe lists no older events"]),
        ("1d", {"STRIPE_API_KEY": None}, ["STRIPE_API_KEY is missing", "may read Events"]),
        ("1d", {"STRIPE_API_KEY": SECRET}, ["STRIPE_API_KEY: expected a secret key"]),
    ],
)
def test_a_reconciliation_that_cannot_start(
    run: Run, listener: socket.socket, since: str, settings: dict[str, str | None], words: list[str]
) -> None:
    """A period that Stripe does not list, or a bad key: exit 2, and no request reaches Stripe."""
    stripe = {"STRIPE_API_KEY": KEY, "STRIPE_API_BASE": f"http://127.0.0.1:{listener.getsockname()[1]}"}
    postgres = "postgresql://nobody@127.0.0.1:9/x"
    assert_refused(run("reconcile", "--since", since, **{**stripe, "DATABASE_URL": postgres, **settings}), *words)
    assert connections(listener) == 0


async def test_a_log_that_would_show_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """STRIPE_LOG has Stripe's library print payloads: `reconcile` refuses it, with exit 2."""
    monkeypatch.setenv("STRIPE_LOG", "debug")
    with pytest.raises(ConfigurationError, match=r"STRIPE_LOG.*payloads") as refused:
        async with StripeEvents.connect("https://api.stripe.com", KEY):
            pytest.fail("it would have printed payloads")
    assert refused.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("currency", ["--set currency", "path=value"]),
        ("data.objekt.currency=usd", ["no 'objekt'", "did you mean object?"]),
        ("data.object.currncy=usd", ["no 'currncy'", "did you mean currency?"]),
        ("livemod=true", ["no 'livemod'", "did you mean livemode?"]),
        ("data.object.lines.data.99.amount=1", ["no '99'"]),
        ("id.x=1", ["--set id.x"]),
    ],
)
def test_a_field_that_cannot_be_set(run: Run, change: str, words: list[str]) -> None:
    """A change of an event that leads nowhere: exit 2, and the part of the path that is wrong."""
    assert_refused(run("send", "invoice.paid", "--secret", SECRET, "--set", change), *words)


@pytest.mark.parametrize("command", [["send", "invoice.paid"], ["load"]])
def test_a_secret_that_is_none(run: Run, command: list[str]) -> None:
    """`--secret` is checked as the setting is: exit 2, what it is instead, and nothing of its value."""
    outcome = run(*command, "--secret", "sk_test_4eC39HqLyjWD")
    assert_refused(outcome, "--secret: ", "an API key (sk_...)", "whsec_...")
    assert "4eC39" not in outcome[1]


def test_yes_needs_a_limit(run: Run) -> None:
    """`--yes` alone would replay whatever matches: exit 2, with the option that it needs."""
    assert_refused(run("events", "replay", "--status", "dead", "--yes"), "--at-most")


def test_a_group_holds_what_prune_spares(run: Run) -> None:
    """`prune --group` alone would delete nothing: exit 2, with the option that it needs."""
    assert_refused(run("events", "prune", "--group", "0f3a"), "--include-dead")


@pytest.mark.parametrize(
    ("chosen", "count", "at_most", "passes"),
    [(3, None, 3, True), (2, None, 3, True), (4, None, 3, False), (3, 3, 3, True), (2, 3, 3, False), (4, 4, 3, False)],
)
def test_a_limit_confirms_up_to_it(chosen: int, count: int | None, at_most: int, passes: bool) -> None:
    """With --at-most and --yes nobody is asked: more events than that, or than --count, are exit 1."""
    if passes:
        _confirm(chosen, count, at_most, yes=True)
        return
    with pytest.raises(typer.Exit) as refused:
        _confirm(chosen, count, at_most, yes=True)
    assert refused.value.exit_code == 1


def test_reload_needs_one_worker(run: Run) -> None:
    """`--reload` with several workers: exit 2, and both options are named."""
    assert_refused(run("serve", "--reload", "--workers", "2"), "--reload", "--workers 1")


@pytest.mark.parametrize("command", [["check"], ["migrate"], ["events", "list"], ["stats"], ["psql"]], ids=" ".join)
def test_only_serve_creates_a_store(run: Run, tmp_path: Path, command: list[str]) -> None:
    """A command without stores: exit 2, the variable that is not set, and nothing is created."""
    assert_refused(run(*command), "DATABASE_URL is not set", "firstclaim serve")
    assert list(tmp_path.iterdir()) == []


# -- exit code 2: settings and handler modules --------------------------------------------------------


@pytest.mark.parametrize(
    ("secrets", "options", "said"),
    [
        (f"connect={SECRET}", [], "no secret of the endpoint without a name; --endpoint connect"),
        (f"{SECRET},a={SECRET},b={SECRET}", ["--endpoint", "c"], "no secret of an endpoint 'c'; --endpoint a or b"),
        (SECRET, ["--endpoint", "c"], "no secret of an endpoint 'c': add c=whsec_..."),
    ],
)
@pytest.mark.parametrize("command", [["send", "invoice.paid"], ["load"]], ids=" ".join)
def test_an_endpoint_without_a_secret(
    run: Run, command: list[str], secrets: str, options: list[str], said: str
) -> None:
    """`send` and `load` to an endpoint that has no secret: exit 2, and the names that there are."""
    stores = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x", "REDIS_URL": "redis://127.0.0.1:9"}
    assert_refused(run(*command, *options, STRIPE_WEBHOOK_SECRETS=secrets, **stores), said)


@pytest.mark.parametrize("typed", ["", "two\n"])
def test_nobody_to_ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str) -> None:
    """A replay without a terminal names the options that take the place of the answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(typer.Exit) as ended:
        _confirm(2, None, None, yes=False)
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert said.out.endswith("Type 2 to replay them: \n")
    for word in ("without a terminal", "--count", "--at-most N --yes", "Nothing was changed"):
        assert word in said.err


def test_an_answer_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number may be piped in: it is an answer as one that is typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n"))
    _confirm(2, None, None, yes=False)


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize("types", ["invoice*", "", "a b", "invoice.paid,charge.*"])
def test_types_that_no_pause_can_have(run: Run, command: str, types: str) -> None:
    """What is no pattern of a handler: exit 2, and what is expected."""
    assert_refused(run(command, types), "expected an event type", "prefix.*")


@pytest.mark.parametrize("types", ["handler:bad,handler:good", "handler:bad;", "task:a:b", "task:", "handler:n*"])
def test_names_that_no_follow_up_can_have(run: Run, types: str) -> None:
    """A pause of a name that cannot be declared would pause nothing, without a word."""
    assert_refused(run("pause", types), "expected an event type", "handler:name", types)


def test_several_types_in_one_pause(run: Run) -> None:
    """Filters take several with commas between, a pause does not: it says so."""
    for types in ("handler:bad,handler:good", "invoice.paid,charge.*"):
        assert_refused(run("pause", types), "expected an event type", "call the command once for each")


def test_reconcile_for_an_unknown_endpoint(run: Run) -> None:
    """`reconcile` under a name that no secret has: exit 2, before Stripe or Postgres is asked."""
    stores = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x", "REDIS_URL": "redis://127.0.0.1:9"}
    outcome = run(
        *("reconcile", "--since", "1d", "--endpoint", "c"), STRIPE_API_KEY=KEY, STRIPE_WEBHOOK_SECRETS=SECRET, **stores
    )
    assert_refused(outcome, "--endpoint: STRIPE_WEBHOOK_SECRETS names no endpoint 'c'")


@pytest.mark.parametrize("command", [["check"], ["serve", "--port", "0"]], ids=" ".join)
@pytest.mark.parametrize("secrets", [None, " ", f"{SECRET},"], ids=["missing", "blank", "stray comma"])
def test_no_signing_secret(run: Run, command: list[str], secrets: str | None) -> None:
    """No secret, or a blank one among others, would accept any delivery: exit 2, and the variable is named."""
    stores = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x", "REDIS_URL": "redis://127.0.0.1:9"}
    assert_refused(run(*command, STRIPE_WEBHOOK_SECRETS=secrets, **stores), "STRIPE_WEBHOOK_SECRETS")


@pytest.mark.parametrize("command", [["send", "invoice.paid"], ["load"]], ids=" ".join)
def test_nothing_to_sign_with(run: Run, command: list[str]) -> None:
    """`send` and `load` without a secret: exit 2, with both ways to get one."""
    assert_refused(run(*command), "set STRIPE_WEBHOOK_SECRETS", "firstclaim serve")


def test_a_weak_password(run: Run) -> None:
    """A short password for the admin page: exit 2 with a sentence that does not show the value."""
    outcome = run("serve", "--port", "0", FIRSTCLAIM_ADMIN_PASSWORD="hunter2")
    assert_refused(outcome, "FIRSTCLAIM_ADMIN_PASSWORD", "too short", "12 characters")
    assert "hunter2" not in outcome[1]


def test_two_handlers_for_one_type(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exclusive type with two handlers: `check` ends with exit 2, although the stores fail too, and names both."""
    declared = '@on("invoice.payment_failed", exclusive=True)\nasync def act(event, context): return "acted"\n'
    (tmp_path / "second_handlers.py").write_text(f"from firstclaim import on\n{declared}")
    monkeypatch.syspath_prepend(tmp_path)
    stores = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x", "REDIS_URL": "redis://127.0.0.1:9"}
    modules = "firstclaim.handlers,second_handlers"
    assert_refused(
        run("check", STRIPE_WEBHOOK_SECRETS=SECRET, FIRSTCLAIM_HANDLERS=modules, **stores),
        *('two handlers for "invoice.payment_failed"', "record_payment_failure", "act", "postgres", "redis"),
    )


@pytest.mark.parametrize(
    ("pattern", "hinted"),
    [
        ("*", "invoice.payment_failed"),
        ("invoice.*", "invoice.payment_failed"),
        ("customer.*", "customer.created"),
        ("charge.refunded", "charge.refunded"),
        ("payout.paid", None),
    ],
)
def test_the_type_that_serve_hints_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, hinted: str | None
) -> None:
    """`serve` hints at sending a type that has a handler and a template, or at none."""
    name = "hinted_" + "".join(each for each in pattern if each.isalpha())
    code = f'from firstclaim import on\n@on("{pattern}")\nasync def act(event, context): return "acted"\n'
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert _handled_type(Settings(handlers=(name,))) == hinted


# -- exit code 3: Postgres is unreachable -------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["migrate"],
        ["epoch", "rotate"],
        ["events", "list"],
        ["events", "show", "evt_1"],
        ["events", "replay", "evt_1"],
        ["events", "prune"],
        ["stats"],
        ["pause", "invoice.*"],
        ["resume", "invoice.*"],
        ["pauses"],
        ["reconcile", "--since", "1d"],
        ["load", "--secret", SECRET],
        ["load", "--secret", SECRET, "--database-url", f"postgresql://user:{PASSWORD}@127.0.0.1:9/ledger"],
    ],
    ids=" ".join,
)
def test_a_ledger_that_is_unreachable(
    run: Run, command: list[str], unused_tcp_port: int, listener: socket.socket
) -> None:
    """Nothing listens where Postgres should be: exit 3, one line says what to check, and Stripe gets no request."""
    settings = {
        "DATABASE_URL": f"postgresql://nobody:{PASSWORD}@127.0.0.1:{unused_tcp_port}/x",
        "STRIPE_API_KEY": KEY,
        "STRIPE_API_BASE": f"http://127.0.0.1:{listener.getsockname()[1]}",
    }
    code, output = run(*command, **settings)
    assert_refused((code, output), "Postgres: ConnectionRefusedError", "that the server runs", code=UNAVAILABLE)
    assert output.count("\n") == 1
    assert connections(listener) == 0
