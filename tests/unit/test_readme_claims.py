"""What our pages claim is what the code does: their figures, commands and examples, and a test for each promise.

`tests/README.md` lists the promises, each with the tests or the command behind it.
"""

import ast
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from firstclaim.admin import events as admin_events
from firstclaim.admin import limits as admin_limits
from firstclaim.admin import session as admin_session
from firstclaim.cli import load, prune
from firstclaim.cli.commands import app
from firstclaim.embedded import processes
from firstclaim.inbox import lock_commands, transaction_watch
from firstclaim.loadtest.capacity import OVERHEAD_SECONDS
from firstclaim.migrations import locking
from firstclaim.operations import limits, search, stripe_api
from firstclaim.registry import Registry
from firstclaim.server import preflight, protocol, redis_server_check, runner, supervisor
from firstclaim.settings import ADMIN_CONNECTIONS, METRICS_CONNECTIONS, Settings
from tests.blocks import block

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CLAIMS = ROOT / "tests" / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
DAY = 86_400


def flat(text: str) -> str:
    """The text with every run of white space as one space: a claim may be wrapped anywhere."""
    return " ".join(text.split())


# What users read: a claim may stand on any of these pages, and on one of them only.
CLAIMING = flat("\n".join(path.read_text() for path in [README, *sorted((ROOT / "docs").rglob("*.md"))]))


def default(command: Callable[..., None], name: str) -> Any:
    """The default of a command's option."""
    return inspect.signature(command).parameters[name].default


# -- figures ------------------------------------------------------------------------------------------

SETTINGS = Settings.model_construct()
OPEN_CONNECTIONS = SETTINGS.handler_slots + SETTINGS.ingest_connections
REQUIRES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]

FIGURES = [
    f"Python {REQUIRES.removeprefix('>=')} or newer",
    f"any PostgreSQL from {preflight._MIN_POSTGRES // 10_000}",
    f"any Redis from {redis_server_check._MIN_REDIS[0]} or Valkey from 8",
    f"`FIRSTCLAIM_HANDLER_SLOTS` + `FIRSTCLAIM_INGEST_CONNECTIONS` ({OPEN_CONNECTIONS} by default), "
    f"{METRICS_CONNECTIONS} for metrics, and {ADMIN_CONNECTIONS} for the admin page",
    f"`max_connections` >= {SETTINGS.postgres_connections} per worker",
    f"*slots / (latency of the handler + {OVERHEAD_SECONDS * 1000:.0f} ms)*",
    *(
        f"| {SETTINGS.handler_slots / (milliseconds / 1000 + OVERHEAD_SECONDS):,.0f}/s |"
        for milliseconds in (2, 20, 100, 1000)
    ),
    f"at most as many bytes of incomplete requests as {runner._MAX_BUFFERED_BODIES} bodies of the maximum size",
    f"stopping them takes up to {processes.STOP_SECONDS} s more each",
    f"after at most {supervisor._MAX_DELAY_SECONDS:.0f} s if workers keep dying",
    f"abandoned {('eight' if SETTINGS.abandoned_most == 8 else '?')} times is `dead`",
    f"the event was abandoned {SETTINGS.abandoned_most} times",
    f"due again after {SETTINGS.backoff_first_seconds:g} s, doubling to {SETTINGS.backoff_most_seconds / 3600:g} h",
    f"failed for {SETTINGS.give_up_seconds / DAY:g} days",
    f"still processing after {SETTINGS.answer_budget_seconds:g} s",
    f"body over {SETTINGS.body_most_bytes // 2**20} MiB",
    f"headers over {protocol.MAX_HEAD_BYTES // 2**10} KiB",
    f"body slower than {SETTINGS.body_timeout_seconds:g} s, headers slower than {protocol.HEAD_SECONDS:g} s",
    f"The service looks {'once a second' if transaction_watch._MAX_PERIOD_SECONDS == 1 else '?'}",
    f"the events of up to the last {limits.LISTED_DAYS_MOST} days through Stripe's API",
    f"up to {'a minute' if stripe_api._RETRY_AFTER_MOST_SECONDS == 60 else '?'}",
    f"up to {admin_events.REPLAYED_MOST:,} that match",
    f"{admin_limits.ADDRESS_ATTEMPTS} attempts per address, then one more per "
    f"{'minute' if admin_limits.ADDRESS_SECONDS == 60 else '?'}",
    f"{admin_limits.ALL_ATTEMPTS} attempts, then one more every {admin_limits.ALL_SECONDS:g} seconds",
    f"A session ends after {admin_session.LASTS_SECONDS // 3600} hours, or after "
    f"{admin_session.IDLE_SECONDS // 60} minutes without use",
    f"Postgres ends every statement after {search.STATEMENT_SECONDS} seconds",
    f"the newest {search.PAYLOADS_MOST:,} payloads",
    f"If your ledger was large ({locking._LARGE_BYTES // 2**20} MB)",
    f"Payloads are deleted after {default(prune.prune, 'payload_days')} days",
    f"Rows are deleted after {default(prune.prune, 'row_days')} days, and never before {limits.ROW_DAYS_LEAST}",
    f"for at most {default(prune.prune, 'busy_percent')}% of the time",
    f"{default(load.load, 'concurrent_duplicates')}% of the events are sent as `--copies` "
    f"({default(load.load, 'copies')})",
    f"{default(load.load, 'duplicates')}% are sent a second time",
    f"still unfinished `--settle` seconds ({default(load.load, 'settle')}) after the end",
]


@pytest.mark.parametrize("claim", FIGURES)
def test_the_figures_are_those_of_the_code(claim: str) -> None:
    """Each figure on our pages is a constant or a default of the code: whoever changes one changes both."""
    assert claim in CLAIMING


def test_the_rights_of_the_redis_user() -> None:
    """The runbook lists the commands that the lock sends, and the PING of `/readyz`: no more, and no fewer."""
    listed = re.search(r"The user needs ([A-Z, ]+) and PING", CLAIMING)
    assert listed
    assert set(listed[1].split(", ")) == set(lock_commands.REPLIES)


# What a column is stored with (SET COMPRESSION) is no part of what a build reads or writes.
NARROWS = re.compile(
    r"\b(DROP|RENAME|ADD\s+CONSTRAINT|UNIQUE|TRUNCATE|DELETE|UPDATE"
    r"|ALTER\s+(?!TABLE\b|(COLUMN\s+)?\w+\s+SET\s+(COMPRESSION|DEFAULT)\b)"
    r"|ADD\s+COLUMN\s[^,;]*NOT\s+NULL(?![^,;]*DEFAULT))",
    re.IGNORECASE,
)


def test_migrations_only_add() -> None:
    """No migration after the first drops, renames or narrows anything: the previous build works on the new schema."""
    revisions = sorted((ROOT / "service" / "firstclaim" / "migrations" / "versions").glob("0*.py"))
    assert len(revisions) >= 7
    for path in revisions[1:]:
        code = ast.parse(path.read_text())
        statements = [
            node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and node is not _doc(code)
        ]
        text = "\n".join(statement for statement in statements if isinstance(statement, str))
        assert not NARROWS.search(text), path.name


@pytest.mark.parametrize(
    ("change", "narrows"),
    [
        ("ADD COLUMN c text", False),
        ("ADD COLUMN c integer NOT NULL DEFAULT 0", False),
        ("ADD COLUMN c integer NOT NULL", True),
        ("ADD CONSTRAINT c CHECK (a > 0)", True),
        ("ALTER COLUMN c SET COMPRESSION lz4", False),
        ("ALTER c SET COMPRESSION lz4", False),
        ("ALTER COLUMN c SET DEFAULT clock_timestamp()", False),
        ("ALTER COLUMN c SET DEFAULT 0, ALTER COLUMN d TYPE integer", True),
        ("ALTER COLUMN c SET NOT NULL", True),
        ("ALTER COLUMN c SET STORAGE PLAIN", True),  # refuses what is longer than a page
        ("ALTER COLUMN c TYPE integer", True),
        ("ALTER c TYPE integer", True),
        ("ALTER COLUMN c DROP DEFAULT", True),
        ("ALTER COLUMN c SET COMPRESSION lz4, ALTER COLUMN d TYPE integer", True),
        ("DROP COLUMN c", True),
        ("RENAME TO u", True),
    ],
)
def test_what_narrows_a_table(change: str, narrows: bool) -> None:
    """The rule of the test above: what an older build writes or reads must stay possible."""
    assert bool(NARROWS.search(f"ALTER TABLE t {change};")) is narrows


def _doc(tree: ast.Module) -> ast.expr | None:
    first = tree.body[0]
    return first.value if isinstance(first, ast.Expr) else None


# -- commands -----------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a shell block or in backticks; variables before it and comments are left out."""
    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in lines + spans:
        if "'" in line.replace("'\\''", "") and line.count("'") % 2:
            continue
        words = shlex.split(line.replace("[", " ").replace("]", " ") if line in spans else line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "&", ";", "|"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)


def options_of(words: list[str]) -> tuple[str, set[str]]:
    """The command of `firstclaim` that these words call, and its options. Raises `KeyError` if there is none."""
    command: Any = typer.main.get_command(app)
    path = "firstclaim"
    for word in words:
        if word.startswith("-") or not hasattr(command, "commands"):
            break
        command, path = command.commands[word], f"{path} {word}"
    passed_on = {
        word for word in words if command.context_settings.get("ignore_unknown_options")
    }  # to another program, as `psql`
    return path, {option for parameter in command.params for option in parameter.opts} | {"--help"} | passed_on


TASKS = re.findall(r"^(\w+)(?: \*arguments)?:", (ROOT / "justfile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_exists(page: Path) -> None:
    """Each subcommand, option, task, module and test file that a page tells the reader to run is there."""
    for words in commands(page):
        match [words[0].removeprefix(".venv/bin/"), *words[1:]]:
            case ["firstclaim", *rest] if rest:
                path, options = options_of(rest)
                used = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
                assert used <= options, (path, used - options)
            case ["just", *rest] if rest and not rest[0].startswith("-"):
                assert rest[0] in TASKS, rest[0]
            case ["python" | "python3", "-m", "pytest", *rest]:
                assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), rest
            case ["python" | "python3", "-m", module, *_] if module.startswith("tests."):
                path_of = ROOT.joinpath(*module.split("."))
                assert path_of.with_suffix(".py").exists() or (path_of / "__main__.py").exists(), module
            case ["bash", script, *_]:
                assert (ROOT / script).exists(), script


# -- examples -----------------------------------------------------------------------------------------


def test_the_handler_of_the_readme_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example can be loaded as `shop.handlers`, and declares a handler for `invoice.paid`."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "handlers.py").write_text(block("README.md", "first handler"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("shop", "shop.handlers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    handler = Registry.load(["shop.handlers"]).find("invoice.paid")
    assert handler is not None
    assert handler.is_async


# -- promises -----------------------------------------------------------------------------------------


def claims() -> list[tuple[str, str]]:
    """The rows of `tests/README.md`: a sentence of one of our pages, and what backs it."""
    text = CLAIMS.read_text().partition("## What our pages claim")[2]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE)
    return [row for row in rows if row[0] not in ("claim", "---")]


def test_every_claim_is_on_a_page() -> None:
    """`tests/README.md` quotes our pages: a promise that is reworded there is looked at here."""
    assert [claim for claim, _ in claims() if claim not in CLAIMING] == []


def test_every_claim_has_a_test_that_exists() -> None:
    """Behind each claim stands a test that exists, or a command."""
    names: dict[str, set[str]] = {}
    for claim, backed_by in claims():
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", backed_by)
        assert tests or re.search(r"`(just|python -m|firstclaim) ?", backed_by), claim
        for path, name in tests:
            if path not in names:
                tree = ast.parse((ROOT / "tests" / path).read_text())
                names[path] = {
                    node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                }
            assert name in names[path], (path, name)
