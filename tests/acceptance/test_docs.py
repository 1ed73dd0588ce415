"""The blocks of the how-to guides and the reference, on one database and beside one service.

Commands run in this process: a process for each would cost a second of CPU time.
"""

import asyncio
import contextlib
import shlex
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import asyncpg
import orjson
import pytest
import pytest_asyncio
import sqlalchemy
import stripe
import yaml
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.routing import Mount
from typer.testing import CliRunner

import firstclaim
from firstclaim import BatchContext, Context, Event, on
from firstclaim.cli.commands import app
from firstclaim.mounted import MountedApp
from firstclaim.registry import handlers_of
from firstclaim.settings import Settings, environment_name
from firstclaim.status import Status
from firstclaim.testing import Transaction, make_event, transaction
from tests.acceptance.harness import PROCESSED, Sandbox, Service, eventually, sample
from tests.blocks import block
from tests.reference import alert_rules
from tests.stores import Stores
from tests.stripe_api import KEY, StripeApi

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = {"Context": Context, "BatchContext": BatchContext, "Event": Event, "on": on, "stripe": stripe, "text": text}
NAMES |= {"Transaction": Transaction, "make_event": make_event}


def loaded(code: str, **more: Any) -> dict[str, Any]:
    """The names that the block defines. It has what the other blocks of its page have imported."""
    names = {**NAMES, **more, "__name__": __name__}
    exec(code, names)  # noqa: S102
    return names


# -- handlers -----------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def given(shared_sandbox: Sandbox) -> AsyncIterator[Transaction]:
    """A transaction that is rolled back."""
    async with transaction(shared_sandbox.database_url) as given:
        yield given


async def test_the_typed_handler() -> None:
    """It gets stripe-python's object, with the currency as a text. What mypy says of it: `test_shop.py`."""
    grant_access = loaded(block("docs/how-to/typed-events.md", "typed") + "    return currency\n")["grant_access"]
    assert await grant_access(make_event("invoice.paid", object={"currency": "eur"}), None) == "eur"


async def test_the_batch_handler(given: Transaction) -> None:
    """A batch of three events about two customers welcomes each of them once."""
    await given.fetch("CREATE TABLE welcomes (customer text PRIMARY KEY)")
    events = [make_event("customer.created", object={"id": name}) for name in ("cus_2", "cus_1", "cus_2")]
    welcome = loaded(block("docs/how-to/batch-handlers.md", "batch"))["welcome"]
    assert await given.deliver_batch(welcome, events) == ["welcomed"] * 3
    rows = await given.fetch("SELECT customer FROM welcomes ORDER BY 1")
    assert [row[0] for row in rows] == ["cus_1", "cus_2"]


async def test_the_keys_of_fresh_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's setting is three keys: of both modes, and of a named endpoint."""
    name, _, value = block("docs/how-to/fresh-objects.md", "keys").removeprefix("export ").strip().partition("=")
    monkeypatch.setenv(name, value)
    assert set(Settings().api_keys) == {(None, True), (None, False), ("eu", True)}


async def test_the_handler_of_fresh_objects(given: Transaction) -> None:
    """The page's test passes with the page's handler, which writes what is so now; a deleted object is gone."""
    await given.fetch("CREATE TABLE access (customer text PRIMARY KEY, status text)")
    names = loaded(block("docs/how-to/fresh-objects.md", "fresh") + block("docs/how-to/fresh-objects.md", "test"))
    await names["test_a_canceled_subscription"](given)
    assert [tuple(row) for row in await given.fetch("SELECT * FROM access")] == [("cus_1", "canceled")]
    event = make_event("customer.subscription.deleted", object={"id": "sub_1", "object": "subscription"})
    gone = {"id": "sub_1", "object": "subscription", "deleted": True}
    assert await given.deliver(names["sync_access"], event, fresh=gone) == "gone"


async def test_the_handlers_with_a_key(given: Transaction) -> None:
    """One writes what its event says; the other's key is the customer, of the events of both kinds of object."""
    await given.fetch("CREATE TABLE shops AS SELECT 'cus_1' AS customer, 'none' AS plan")
    keep = loaded(block("docs/how-to/one-at-a-time.md", "key"))["keep"]
    subscription = {"id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active"}
    event = make_event("customer.subscription.updated", object=subscription)
    assert await given.deliver(keep, event) == "kept"
    assert await given.fetch("SELECT plan FROM shops") == [("active",)]
    names = loaded(block("docs/how-to/one-at-a-time.md", "key-function"))
    customer = make_event("customer.created", object={"id": "cus_1"})
    assert {names["customer_of"](each) for each in (event, customer)} == {"cus_1"}
    (handler, _) = handlers_of(names["keep"])
    assert handler.options.key is names["customer_of"]


async def test_the_handler_with_limits() -> None:
    """It declares every limit, as its comments say."""
    (handler,) = handlers_of(loaded(block("docs/how-to/limits.md", "limits"))["book"])
    assert handler.options.words == [
        "slots 4",
        "per_second 10",
        "deadline 120 s",
        "backoff 60 to 7200 s",
        "give_up 86400 s",
        "priority -1",
    ]


async def test_a_handler_that_was_code_of_your_own(given: Transaction) -> None:
    """What the old code has processed is skipped; anything else is done."""
    await given.fetch("CREATE TABLE processed_events (id text PRIMARY KEY)")
    await given.fetch("CREATE TABLE access (customer text, invoice text)")
    grant_access = loaded(block("docs/how-to/migrate-from-plain-code.md", "plain-code"))["grant_access"]
    old, new = make_event("invoice.paid"), make_event("invoice.paid")
    await given.fetch("INSERT INTO processed_events VALUES ($1)", old.id)
    assert await given.deliver(grant_access, old) == "done_by_the_old_code"
    assert await given.deliver(grant_access, new) == "access_granted"
    assert [row[0] for row in await given.fetch("SELECT invoice FROM access")] == [new.object_id]


async def test_a_handler_that_was_dj_stripes(given: Transaction) -> None:
    """An effect that the old handler has had under the same event's id is not made again."""
    await given.fetch("CREATE TABLE shop_reminder (event text PRIMARY KEY, customer text)")
    remind = loaded(block("docs/how-to/migrate-from-dj-stripe.md", "dj-stripe"))["remind"]
    subscription = {"id": "sub_1", "object": "subscription", "customer": "cus_1"}
    old, new = (make_event("customer.subscription.trial_will_end", object=subscription) for _ in range(2))
    await given.fetch("INSERT INTO shop_reminder VALUES ($1, 'cus_1')", old.id)
    for event in (old, new):
        assert await given.deliver(remind, event) == "reminded"
    rows = await given.fetch("SELECT event FROM shop_reminder")
    assert {row[0] for row in rows} == {old.id, new.id}


# -- applications and settings ------------------------------------------------------------------------


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package `shop` with handlers, and the settings of the page in the environment."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "handlers.py").write_text("from firstclaim import on\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("shop", "shop.handlers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, value in {
        "DATABASE_URL": "postgresql://shop@127.0.0.1:1/shop",
        "REDIS_URL": "redis://127.0.0.1:1",
        "STRIPE_WEBHOOK_SECRETS": "whsec_shop",
        "FIRSTCLAIM_HANDLERS": "shop.handlers",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("shop")
async def test_beside_django(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's ASGI module serves both, with the lifespan of ours. Django's application is a stand-in."""
    django = Starlette()
    asgi = SimpleNamespace(get_asgi_application=lambda: django)
    for name, module in {
        "django": ModuleType("django"),
        "django.core": ModuleType("core"),
        "django.core.asgi": asgi,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    names = loaded(block("docs/how-to/embed.md", "shop/asgi.py"))
    payments, rest = names["application"].routes
    assert isinstance(payments, Mount)
    assert (payments.path, payments.app) == ("/payments", names["webhooks"])
    assert (rest.path, rest.app) == ("", django)
    assert isinstance(names["webhooks"], MountedApp)


@pytest.mark.usefixtures("shop")
async def test_settings_in_code() -> None:
    """The page's settings are accepted, and the rest comes from the environment."""
    names = loaded("import firstclaim\n" + block("docs/how-to/embed.md", "settings"))
    assert isinstance(names["webhooks"], MountedApp)
    assert names["settings"].handler_slots == 5
    assert names["settings"].database_url.get_secret_value().startswith("postgresql://shop@")


@pytest.mark.usefixtures("shop")
async def test_who_may_open_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's settings for a proxy that logs people in are valid together."""
    for line in block("docs/how-to/admin-page.md", "who").splitlines():
        monkeypatch.setenv(*line.split("=", 1))
    monkeypatch.setenv(environment_name("admin_password"), "correct horse battery staple")
    assert firstclaim.Settings().admin_operators == ("ada@example.com", "grace@example.com")
    assert Settings().admin_user_header == "X-Forwarded-Email"


@pytest.mark.usefixtures("shop")
async def test_several_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's secrets are valid together, and its handler takes an event of each endpoint that it names."""
    name, _, value = block("docs/how-to/endpoints.md", "secrets").removeprefix("export ").strip().partition("=")
    monkeypatch.setenv(name, value)
    assert Settings().stripe_webhook_secrets
    book_refund = loaded(block("docs/how-to/endpoints.md", "handler"))["book_refund"]
    for endpoint in (None, "eu"):
        assert await book_refund(make_event("charge.refunded", endpoint=endpoint), None) == "refund_booked"


@pytest.mark.usefixtures("shop")
async def test_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both spellings of an address with three servers lead to the same ones."""
    lines = shlex.split(block("docs/how-to/failover.md", "addresses"), comments=True)
    addresses = [word.partition("=")[2] for word in lines if word != "export"]
    assert len(addresses) == 2
    for address in addresses:
        monkeypatch.setenv("DATABASE_URL", address)
        given = Settings().database_url
        assert given is not None
        assert all(server in given.get_secret_value() for server in ("pg1", "pg2", "pg3"))


# -- statements ---------------------------------------------------------------------------------------

SHARE = "docs/how-to/share-a-database.md"


@pytest_asyncio.fixture(loop_scope="module")
async def owner(shared_sandbox: Sandbox) -> "AsyncIterator[asyncpg.Connection[Any]]":
    """A connection of the database's owner, in a transaction that is rolled back: roles belong to the whole server."""
    connection = await asyncpg.connect(shared_sandbox.database_url)
    undone = connection.transaction()
    await undone.start()
    yield connection
    await undone.rollback()
    await connection.close()


async def test_the_schema_for_a_role(owner: "asyncpg.Connection[Any]") -> None:
    """The role owns its schema, and may create tables in it."""
    await owner.execute("DROP SCHEMA firstclaim CASCADE; CREATE ROLE shop")
    await owner.execute(block(SHARE, "schema"))
    await owner.execute("SET LOCAL ROLE shop; CREATE TABLE firstclaim.of_the_shop (a int)")


async def test_the_rights_of_the_service(owner: "asyncpg.Connection[Any]") -> None:
    """A role that owns nothing may use every table of the ledger, and change none of them."""
    await owner.execute("CREATE ROLE shop")
    await owner.execute(block(SHARE, "rights"))
    await owner.execute(
        "SET LOCAL ROLE shop; DELETE FROM firstclaim.stripe_events; SELECT FROM firstclaim.ledger_epoch"
    )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await owner.execute("ALTER TABLE firstclaim.stripe_events ADD COLUMN a int")


async def test_the_search_path_of_a_role(owner: "asyncpg.Connection[Any]") -> None:
    """The setting is stored for the role in this database."""
    name = await owner.fetchval("SELECT current_database()")
    await owner.execute("CREATE ROLE firstclaim")
    await owner.execute(block(SHARE, "search_path").replace("DATABASE shop", f'DATABASE "{name}"'))
    stored = await owner.fetchval("SELECT setconfig FROM pg_db_role_setting WHERE setrole = 'firstclaim'::regrole")
    assert stored == ["search_path=public"]


async def test_what_older_builds_needed_is_dropped(owner: "asyncpg.Connection[Any]") -> None:
    """The statements drop every view that a moved ledger leaves, and the old version table."""
    tables = ("stripe_events", "stripe_event_payloads", "stripe_event_attempts", "ledger_epoch", "operator_actions")
    for table in tables:
        await owner.execute(f"CREATE VIEW public.{table} AS SELECT * FROM firstclaim.{table}")
    await owner.execute("CREATE TABLE public.alembic_version (version_num text)")
    await owner.execute(block(SHARE, "old views"))
    for table in (*tables, "alembic_version"):
        assert await owner.fetchval(f"SELECT to_regclass('public.{table}') IS NULL")


async def test_bodies_are_compressed_with_lz4(owner: "asyncpg.Connection[Any]") -> None:
    """The statement sets the compression, or says that this server was built without it."""
    with contextlib.suppress(asyncpg.FeatureNotSupportedError):  # of "compression method lz4"
        await owner.execute(block("docs/how-to/large-ledger.md", "compression"))
        column = "attrelid = 'firstclaim.stripe_event_payloads'::regclass AND attname = 'body'"
        assert await owner.fetchval(f"SELECT attcompression FROM pg_attribute WHERE {column}") == b"l"


async def test_the_redis_user(stores: Stores) -> None:
    """The user of the page may do what the lock does, on its keys alone."""
    line = block("docs/reference/addresses.md", "acl")
    async with Redis.from_url(stores.redis_url) as admin:
        await admin.execute_command(*shlex.split(line))  # type: ignore[no-untyped-call]
        try:
            async with Redis.from_url(stores.redis_url, username="firstclaim", password="password") as user:
                assert await user.set("firstclaim:a", "b", px=1000)
                assert await user.eval("return redis.call('del', KEYS[1])", 1, "firstclaim:a") == 1
                for refused in (user.set("other:a", "b"), user.flushall()):
                    with pytest.raises(NoPermissionError):
                        await asyncio.ensure_future(refused)
        finally:
            await admin.acl_deluser("firstclaim")


# -- commands -----------------------------------------------------------------------------------------


class Terminal:
    """Runs the blocks of commands in a folder of its own: `export`, and `firstclaim`, whose output may go to a file."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    async def run(self, text: str) -> str:
        """What the commands write. Each must succeed."""
        written = []
        for line in text.replace("&&", "\n").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                for name, _, value in (word.partition("=") for word in words[1:]):
                    if name not in FIXED:
                        self.environment[name] = value
            elif words:
                assert words.pop(0) == "firstclaim", line
                target = words.index(">") if ">" in words else len(words)
                done = await asyncio.to_thread(CliRunner().invoke, app, words[:target], env={**self.environment})
                assert done.exit_code == 0, (line, done.output, done.exception)
                if target < len(words):
                    (self.folder / words[target + 1]).write_text(done.stdout)
                written.append(done.output)
        return "\n".join(written)


# The pages have made-up values for these.
FIXED = ("DATABASE_URL", "REDIS_URL", "FIRSTCLAIM_HANDLERS")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(shared_sandbox: Sandbox) -> Service:
    """A service with two workers, as the page on production starts it, but on the loopback alone."""
    words = block("docs/how-to/production.md", "serve-in-production").rpartition("&& ")[2].split()
    assert words == ["firstclaim", "serve", "--host", "0.0.0.0", "--workers", "2"]  # noqa: S104
    return await shared_sandbox.service(workers=2).start()


@pytest_asyncio.fixture(loop_scope="module")
async def terminal(shared_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Terminal]:
    """A terminal with the service's settings, and with Stripe's API, which lists one event that the ledger lacks."""
    # The runner closes its standard error, which loggers of this process would keep.
    monkeypatch.setattr("firstclaim.observability.logging.configure", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    async with StripeApi().listening() as api:
        missed = sample()
        api.add(missed.body, int(time.time()) - 600, missed.id)
        environment = shared_sandbox.environment({"STRIPE_API_KEY": KEY, "STRIPE_API_BASE": api.base})
        yield Terminal(tmp_path, {"COLUMNS": "200", **environment})


async def test_production(terminal: Terminal) -> None:
    """The commands before `serve` succeed, and the check finds nothing wrong."""
    text = block("docs/how-to/production.md", "serve-in-production")
    assert "warning" not in (await terminal.run(text.rpartition(" && ")[0])).lower()


async def test_both_secrets(terminal: Terminal) -> None:
    """Two secrets, comma separated, are valid."""
    await terminal.run(block("docs/how-to/roll-a-secret.md", "both-secrets"))


async def test_alerts(terminal: Terminal) -> None:
    """One file can be imported, and each alert of the other links to the published runbook."""
    await terminal.run(block("docs/how-to/alerts.md", "alerts"))
    assert orjson.loads((terminal.folder / "firstclaim-dashboard.json").read_text())["panels"]
    [group] = yaml.safe_load((terminal.folder / "firstclaim-alerts.yaml").read_text())["groups"]
    links = [rule["annotations"]["runbook_url"] for rule in group["rules"]]
    assert links == [f"https://docs.example.com/runbook/{rule['alert']}.md" for rule in alert_rules()]


async def test_restore(terminal: Terminal, shared_sandbox: Sandbox, service: Service) -> None:
    """The epoch changes, and the event that the ledger lacks is recorded and handled by the service."""
    before = await shared_sandbox.fetch("SELECT id FROM firstclaim.ledger_epoch")
    await terminal.run(block("docs/how-to/restore.md", "rotate"))
    assert before != await shared_sandbox.fetch("SELECT id FROM firstclaim.ledger_epoch")
    written = await terminal.run(block("docs/how-to/restore.md", "since-the-backup"))
    assert "1 would be recorded" in written
    assert "1 recorded" in written
    await eventually(shared_sandbox.statuses, lambda statuses: set(statuses) == {Status.COMPLETED})
    assert service.pid


async def test_reconcile(terminal: Terminal) -> None:
    """Both pages record what Stripe lists, once."""
    assert "1 recorded" in await terminal.run(block("docs/how-to/reconcile.md", "reconcile"))
    assert "1 already in the ledger" in await terminal.run(
        block("docs/how-to/migrate-from-plain-code.md", "changeover")
    )


async def test_replay(terminal: Terminal, shared_sandbox: Sandbox, service: Service) -> None:
    """A dead event is listed, replayed by the page's command, and completed when the command ends."""
    event = sample()
    assert (await shared_sandbox.deliver(service, event)).result == PROCESSED
    await shared_sandbox.fetch("DELETE FROM effects WHERE event_id = $1", event.id)  # as if its handler had failed
    await shared_sandbox.fetch("UPDATE firstclaim.stripe_events SET status = 'dead' WHERE event_id = $1", event.id)
    assert event.id in await terminal.run(block("docs/how-to/replay-after-a-bug.md", "replay"))
    assert (await shared_sandbox.settled(event)).attempt == 2


async def test_prune(terminal: Terminal, shared_sandbox: Sandbox, service: Service) -> None:
    """An event that was completed long ago is gone, and a recent one is not."""
    old, new = sample(), sample()
    for event in (old, new):
        assert (await shared_sandbox.deliver(service, event)).result == PROCESSED
    age = (
        "UPDATE firstclaim.stripe_events SET settled_at = now() - interval '401 days',"
        " received_at = now() - interval '401 days' WHERE event_id = $1"
    )
    await shared_sandbox.fetch(age, old.id)
    await terminal.run(block("docs/how-to/prune.md", "prune"))
    assert await shared_sandbox.row(old) is None
    assert await shared_sandbox.row(new) is not None
    await shared_sandbox.fetch("DELETE FROM effects WHERE event_id = $1", old.id)  # its row is gone


async def test_archive(terminal: Terminal, shared_sandbox: Sandbox, service: Service, tmp_path: Path) -> None:
    """An old payload is stored and pruned, printed byte for byte, and put back."""
    event = sample()
    assert (await shared_sandbox.deliver(service, event)).result == PROCESSED
    for table in ("stripe_events", "stripe_event_payloads"):
        age = f"UPDATE firstclaim.{table} SET received_at = now() - interval '100 days' WHERE event_id = $1"
        await shared_sandbox.fetch(age, event.id)
    settled = "UPDATE firstclaim.stripe_events SET settled_at = now() - interval '99 days' WHERE event_id = $1"
    await shared_sandbox.fetch(settled, event.id)
    text = block("docs/how-to/prune.md", "archive").replace("evt_1SxQzYKdVq2Wn7Rt", event.id)
    written = await terminal.run(text.replace("/srv/archive", str(tmp_path / "archive")))
    assert f"stored 1 payload at file://{tmp_path}/archive; deleted 1 payload, and 0 events" in written
    assert (tmp_path / "event.json").read_bytes() == event.body
    [row] = await shared_sandbox.fetch(
        "SELECT body FROM firstclaim.stripe_event_payloads WHERE event_id = $1", event.id
    )
    assert row["body"] == event.body
    missing = await asyncio.to_thread(
        CliRunner().invoke, app, ["archive", "get", "evt_never", "--received", "2026-01-01"], env=terminal.environment
    )
    assert (missing.exit_code, "has no event 'evt_never'" in missing.output) == (1, True)


async def test_the_commands_of_several_handlers(terminal: Terminal, shared_sandbox: Sandbox) -> None:
    """Their types are filters and pauses like any type."""
    assert "no events" in await terminal.run(block("docs/how-to/several-handlers.md", "commands"))
    assert await shared_sandbox.fetch("SELECT FROM firstclaim.operator_pauses") == []


async def test_the_tasks_of_the_page(given: Transaction) -> None:
    """The page's test passes with the page's handler and tasks; the review is written by its task."""
    mailed: list[str] = []

    async def mail(invoice: str, *, idempotency_key: str) -> None:
        mailed.append(idempotency_key)

    await given.fetch("CREATE TABLE access (customer text)")
    await given.fetch("CREATE TABLE reviews (customer text)")
    reviews = sqlalchemy.Table("reviews", sqlalchemy.MetaData(), sqlalchemy.Column("customer", sqlalchemy.Text))
    more = {"mail": mail, "reviews": reviews}
    code = block("docs/how-to/follow-ups.md", "follow-ups") + block("docs/how-to/follow-ups.md", "test")
    names = loaded(code, **more)
    await names["test_the_receipt_is_sent"](given)
    assert mailed == [given.follow_ups[0].id]
    assert await given.run(names["ask_for_review"]) == "handled"
    assert [row[0] for row in await given.fetch("SELECT customer FROM reviews")] == ["cus_1"]


async def test_pause(terminal: Terminal, shared_sandbox: Sandbox) -> None:
    """The pause is listed, and gone after the last command."""
    assert "invoice.*" in await terminal.run(block("docs/how-to/pause.md", "pause"))
    assert await shared_sandbox.fetch("SELECT FROM firstclaim.operator_pauses") == []
