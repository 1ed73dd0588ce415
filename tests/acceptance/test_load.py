"""`firstclaim load` against a real service: its table, its verdict, its exit code, and the faults it must detect."""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from tests.acceptance.command import Command, Run
from tests.acceptance.harness import PYTHON_PATH, Overrides, Sandbox, Service, eventually
from tests.fixtures import SECRET

PROBE: Overrides = {"handlers": "firstclaim.handlers.load_probe"}

# The sandbox checks at its end, by itself, that effects and completions agree: let it see the probe's.
_PROBE_EFFECTS = """
DROP TABLE effects;
CREATE VIEW effects AS SELECT event_id, attempt, 0 AS pid, xid, recorded_at AS at FROM load_effects
"""

# Ids end in their numbers. Event 3's effect vanishes, event 4's with its row; event 5's effect is there twice.
_TAMPER = """
CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_trigger_depth() > 1 THEN RETURN NEW; END IF;
    IF NEW.event_id ~ '0000000[34]$' THEN RETURN NULL; END IF;
    IF NEW.event_id LIKE '%00000005' THEN INSERT INTO load_effects SELECT NEW.*; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER tamper BEFORE INSERT ON load_effects FOR EACH ROW EXECUTE FUNCTION tamper();
CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM firstclaim.stripe_events WHERE event_id = NEW.event_id;
    RETURN NULL;
END $$;
CREATE TRIGGER vanish AFTER UPDATE ON firstclaim.stripe_events FOR EACH ROW
  WHEN (NEW.event_id LIKE '%00000004' AND NEW.status = 'completed') EXECUTE FUNCTION vanish()
"""

# Events whose number ends in 7 stay in their handler for as long as the lock is held.
_GATE = """
CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.event_id LIKE '%7' THEN PERFORM pg_advisory_xact_lock_shared(4242); END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER gate BEFORE INSERT ON load_effects FOR EACH ROW EXECUTE FUNCTION gate()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(shared_sandbox: Sandbox) -> Service:
    """A service with the probe, for the tests that only send to it."""
    await execute(shared_sandbox, _PROBE_EFFECTS)
    return await shared_sandbox.service(PROBE).start()


@pytest.fixture
async def probed(sandbox: Sandbox) -> Sandbox:
    """A sandbox of the test's own, whose effects are those of the probe."""
    await execute(sandbox, _PROBE_EFFECTS)
    return sandbox


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The command in an empty folder, without any setting."""
    folder = tmp_path / "operator"
    folder.mkdir()
    return Command(folder, {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH, "COLUMNS": "120"})


def known(sandbox: Sandbox) -> dict[str, str]:
    """The settings that name the service's database and its secret."""
    return {"DATABASE_URL": sandbox.database_url, "STRIPE_WEBHOOK_SECRETS": SECRET}


async def execute(sandbox: Sandbox, statement: str) -> None:
    connection = await asyncpg.connect(sandbox.database_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def cell(run: Run, name: str) -> str:
    """The first cell beside `name` in one of the tables."""
    [line] = [line for line in run.output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return line.split("│")[2].strip()


def count(run: Run, name: str) -> int:
    return int(cell(run, name).replace(",", ""))


def event_id(run: Run, number: int) -> str:
    head = re.search(r"events (evt_load[0-9a-f]{8})", run.output)
    assert head, run.output
    return f"{head[1]}{number:08}"


async def test_a_load_with_duplicates_is_judged(shared_sandbox: Sandbox, service: Service, command: Command) -> None:
    """Each event's effect once, and no more answers `processed` than events; table, ledger and report agree."""
    before = await shared_sandbox.rows()
    arguments = ("--url", service.url, "--users", "6", "--duration", "3", "--duplicates", "40", "--html", "r.html")
    run = await command("load", *arguments, **known(shared_sandbox))
    assert run.code == 0, run.output
    run.shows("No event was lost, and none was doubled.")
    took = re.search(r"handlers took ([\d.]+) ms on average; 20 slots allow 20 / \(\1 ms \+ 5 ms\) = ", run.output)
    assert took
    assert 0 < float(took[1]) < 3000
    sent = count(run, "sent")
    assert sent == count(run, "effects once") == await shared_sandbox.rows() - before
    assert (count(run, "lost"), count(run, "doubled")) == (0, 0)
    assert count(run, "all") > sent
    assert count(run, "ignored") > 0
    # A copy that finds its event's lock held records it, and its effect may come from recovery.
    assert 0 < count(run, "processed") <= sent
    html = (command.folder / "r.html").read_text()
    assert '"name": "processed"' in html
    assert SECRET not in html


async def test_without_a_database_the_verdict_is_unknown(service: Service, command: Command) -> None:
    """Neither DATABASE_URL nor an embedded service: the load runs, and lost and doubled are unknown."""
    run = await command("load", "--url", service.url, "--duration", "1", "--secret", SECRET)
    assert run.code == 0, run.output
    assert [cell(run, name) for name in ("effects once", "lost", "doubled")] == ["unknown"] * 3
    assert count(run, "processed") > 0


async def test_a_rejected_load_has_nothing_to_judge(
    shared_sandbox: Sandbox, service: Service, command: Command
) -> None:
    """Signed with another secret: every delivery is rejected, there is no row, exit 1."""
    arguments = ("--url", service.url, "--duration", "1", "--secret", "whsec_another")
    run = await command("load", *arguments, **known(shared_sandbox))
    assert run.code == 1, run.output
    assert count(run, "rejected") == count(run, "all")
    run.shows("No event was accepted")


async def test_an_interrupted_load_still_has_its_verdict(
    shared_sandbox: Sandbox, service: Service, command: Command
) -> None:
    """Ctrl-C ends the load early; what was sent until then is counted and has a verdict."""
    before = await shared_sandbox.rows()
    arguments = ("--url", service.url, "--duration", "600")
    async with command.running("load", *arguments, **known(shared_sandbox)) as running:
        await eventually(shared_sandbox.rows, lambda rows: rows > before + 10, 60)
        running.interrupt()
        run = await running.wait_for_exit()
    assert run.code == 0, run.output
    assert count(run, "effects once") == count(run, "sent") > 10


async def test_doubled_and_dropped_effects_are_named(probed: Sandbox, command: Command) -> None:
    """One effect doubled, one missing, one missing with its row: exit 1, these three ids are listed and no other."""
    await execute(probed, _TAMPER)
    service = await probed.service(PROBE).start()
    run = await command("load", "--url", service.url, "--duration", "3", **known(probed))
    dropped, gone, doubled = (event_id(run, number) for number in (3, 4, 5))
    probed.waived |= {dropped, doubled}
    assert run.code == 1, run.output
    run.shows(
        f"lost: {dropped}", f"lost: {gone}", f"doubled: {doubled}", "The guarantee was broken: 2 lost, 1 doubled."
    )
    assert (run.output.count("lost: evt_"), run.output.count("doubled: evt_")) == (2, 1)
    assert count(run, "effects once") == count(run, "sent") - 3


@pytest_asyncio.fixture
async def gate(probed: Sandbox) -> AsyncIterator[asyncpg.Connection]:
    """Blocks some events' handlers until it is closed."""
    await execute(probed, _GATE)
    connection = await asyncpg.connect(probed.database_url)
    await connection.execute("SELECT pg_advisory_lock(4242)")
    yield connection
    await connection.close()


async def test_the_verdict_waits_for_what_was_deferred(
    probed: Sandbox, gate: asyncpg.Connection, command: Command
) -> None:
    """Events that are still being handled at the end are waited for, and then counted as usual."""
    service = await probed.service({**PROBE, "answer_budget_seconds": 0.5}).start()
    arguments = ("--url", service.url, "--users", "4", "--duration", "3")
    async with command.running("load", *arguments, "--settle", "100", **known(probed)) as running:
        await running.shows("not settled yet; waiting up to 100 s")
        await gate.close()
        run = await running.wait_for_exit()
    assert run.code == 0, run.output
    assert count(run, "deferred") > 0
    assert count(run, "effects once") == count(run, "sent")


async def test_the_wait_is_bounded(probed: Sandbox, gate: asyncpg.Connection, command: Command) -> None:
    """An event that is not settled in time is neither lost nor completed: it is listed as unsettled, exit code 1."""
    service = await probed.service({**PROBE, "answer_budget_seconds": 0.5}).start()
    arguments = ("--url", service.url, "--users", "4", "--duration", "5", "--settle", "0.5")
    run = await command("load", *arguments, **known(probed))
    assert not gate.is_closed()
    assert run.code == 1, run.output
    run.shows(f"not settled yet: {event_id(run, 7)}", "The guarantee was broken")
    assert (count(run, "lost"), count(run, "doubled")) == (0, 0)
    await service.kill()  # its handlers end with it, and leave no effect


async def test_a_database_that_is_not_the_services_is_refused(command: Command, sandbox: Sandbox) -> None:
    """The database lacks the probe's table: exit 3 before anything is sent, and the command to run."""
    await execute(sandbox, "DROP TABLE load_effects")
    run = await command("load", **known(sandbox))
    assert run.code == 3, run.output
    run.shows("load_effects", "firstclaim migrate")
