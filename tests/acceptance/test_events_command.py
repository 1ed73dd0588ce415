"""`firstclaim events` and `stats` as an operator uses them: beside a running service, on its ledger."""

import asyncio
import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from firstclaim.status import Status
from tests.acceptance.command import SECRET, Command, Run
from tests.acceptance.harness import PROCESSED, PYTHON_PATH, Sample, Sandbox, Service, sample


@pytest.fixture
def command(sandbox: Sandbox, tmp_path: Path) -> Command:
    """On the sandbox's database alone: no Redis, no handlers."""
    folder = tmp_path / "operator"
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": PYTHON_PATH, "STRIPE_WEBHOOK_SECRETS": SECRET}
    return Command(folder, {**environment, "DATABASE_URL": sandbox.database_url, "COLUMNS": "200"})


async def dead_event(sandbox: Sandbox, service: Service, fixed: Path) -> Sample:
    """An event that is dead, whose handler succeeds once that file exists."""
    event = sample("permanent", fixed=str(fixed))
    assert (await sandbox.deliver(service, event)).content["action"] == "dead"
    return event


def objects(run: Run) -> list[dict[str, Any]]:
    """The objects that a run with `--json` printed, one per line."""
    assert run.code == 0, run.output
    return [orjson.loads(line) for line in run.output.splitlines()]


async def test_a_dead_event_is_found_understood_and_replayed(
    sandbox: Sandbox, command: Command, tmp_path: Path
) -> None:
    """List, show, a dry run, a replay with --wait, and the history that the ledger keeps of it."""
    service = await sandbox.service().start()
    fixed = tmp_path / "fixed"
    event = await dead_event(sandbox, service, fixed)
    good = sample()
    assert (await sandbox.deliver(service, good)).result == PROCESSED

    run = await command("events", "list", "--status", "dead")
    run.shows(event.id, "dead", "never")
    assert good.id not in run.output
    assert [each["event_id"] for each in objects(await command("events", "list", "--json"))] == [good.id, event.id]

    run = await command("events", "show", event.id)
    run.shows(event.id, "invoice.payment_failed", "received", "attempt 1", "dead after", "Permanent: never")
    run.shows("tests/acceptance/handlers.py:")  # where it was raised
    assert "metadata" not in run.output  # the payload only with --payload
    [shown] = objects(await command("events", "show", event.id, "--payload", "--json"))
    assert shown["payload"].encode() == event.body  # the very bytes: numbers are not rounded on the way
    assert (shown["status"], shown["actions"]) == ("dead", [])
    [attempt] = shown["attempts"]
    assert (attempt["attempt"], attempt["outcome"], attempt["error"]) == (1, "dead", "Permanent: never")
    assert attempt["frames"][0].startswith("tests/acceptance/handlers.py:")
    assert attempt["process"].endswith(f":{service.pid}")

    run = await command("events", "replay", "--status", "dead", "--dry-run")
    assert run.code == 0, run.output
    run.shows("1 event selected: 1 dead")
    await sandbox.settled(event, Status.DEAD)

    fixed.touch()
    run = await command("events", "replay", event.id, "--at-most", "1", "--yes", "--wait")
    assert run.code == 0, run.output
    run.shows("1 event is due now", "1 completed")
    row = await sandbox.settled(event)
    assert (row.status, row.counts) == (Status.COMPLETED, (2, 0, 0))
    [shown] = objects(await command("events", "show", event.id, "--json"))
    [action] = shown["actions"]
    assert (action["action"], action["selection"]) == ("replay", event.id)
    assert "@" in action["operator"]


async def test_a_failure_is_found_and_replayed_by_its_group(sandbox: Sandbox, command: Command, tmp_path: Path) -> None:
    """The group names handler, class and line; its id selects its events, and none once they are completed."""
    service = await sandbox.service().start()
    fixed = tmp_path / "fixed"
    events = [await dead_event(sandbox, service, fixed) for _ in range(2)]
    [group] = objects(await command("events", "groups", "--newer-than", "1h", "--json"))
    assert group["handler"].startswith("tests.acceptance.handlers.")
    assert (group["error_class"], group["failures"], group["events_dead"]) == ("Permanent", 2, 2)
    assert group["place"].startswith("tests/acceptance/handlers.py:")
    assert group["example_id"] == events[1].id
    run = await command("events", "groups")
    run.shows(group["group"], group["handler"], f"Permanent at {group['place']}", "2 failed attempts", "2 events dead")
    assert "never" not in run.output  # the message may quote the payload

    selected = ("--group", group["group"])
    listed = objects(await command("events", "list", *selected, "--json"))
    assert {each["event_id"] for each in listed} == {each.id for each in events}
    fixed.touch()
    run = await command("events", "replay", *selected, "--at-most", "2", "--yes", "--wait")
    assert run.code == 0, run.output
    run.shows("2 completed")
    (await command("events", "show", events[0].id)).shows("replay by ")
    assert objects(await command("events", "list", *selected, "--json")) == []
    run = await command("events", "groups")
    run.shows("2 failed attempts", "none failed or dead")

    [stats] = objects(await command("stats", "--json"))
    assert (stats["events"]["completed"], stats["events"]["dead"], stats["due"]) == (2, 0, 0)
    (await command("stats")).shows("completed          2")


async def test_a_replay_that_fails_again_says_so(sandbox: Sandbox, command: Command, tmp_path: Path) -> None:
    """The event ends as it did before: exit 1."""
    service = await sandbox.service().start()
    event = await dead_event(sandbox, service, tmp_path / "never")
    run = await command("events", "replay", event.id, "--count", "1", "--wait")
    assert run.code == 1, run.output
    run.shows("1 dead")


async def test_what_may_not_be_replayed(sandbox: Sandbox, command: Command, tmp_path: Path) -> None:
    """Unknown, completed, or being handled right now: refused with the reason, exit 1, and nothing is changed."""
    service = await sandbox.service().start()
    done, held = sample(), sample("hold", gate=str(tmp_path / "gate"))
    assert (await sandbox.deliver(service, done)).result == PROCESSED
    answer = asyncio.create_task(sandbox.deliver(service, held))
    await sandbox.settled(held, Status.PROCESSING)
    for arguments, words in (
        (["evt_unknown", done.id], ["not in the ledger", "evt_unknown"]),
        ([done.id], ["1 event is completed", "--force", "second time"]),
        ([held.id], ["being handled right now"]),
        (["--status", "processing"], ["being handled right now"]),
        (["--status", "dead"], ["0 events selected"]),
    ):
        run = await command("events", "replay", *arguments, "--count", "1")
        assert run.code == 1, run.output
        run.shows(*words)
    run = await command("events", "replay", "--type", "invoice.*", "--status", "completed", "--force", "--count", "7")
    assert run.code == 1, run.output
    run.shows("AGAIN", "the selection matches 1 event, not 7: nothing was changed")
    assert (await sandbox.settled(done)).counts == (1, 0, 0)

    sandbox.waived.add(done.id)
    run = await command("events", "replay", done.id, "--force", "--count", "1", "--wait")
    assert run.code == 0, run.output
    row = await sandbox.row(done)
    assert row is not None
    assert (row.counts, await sandbox.effects(done)) == ((2, 0, 0), 2)
    (tmp_path / "gate").touch()
    await answer
    await sandbox.settled(held)


async def test_an_id_that_cannot_be_one(command: Command) -> None:
    """Bytes that are no text: exit 2, as for every usage error (`tests/unit/test_cli_usage.py`)."""
    run = await command("events", "replay", os.fsdecode(b"evt_\xff"))
    assert run.code == 2, run.output
    run.shows("printable characters")


async def test_an_unknown_event(command: Command) -> None:
    """An id that is not in the ledger: exit 1, and the id is named."""
    run = await command("events", "show", "evt_unknown")
    assert run.code == 1, run.output
    run.shows("no event 'evt_unknown'")


async def test_what_comes_from_outside_is_printed_as_it_is(sandbox: Sandbox, command: Command) -> None:
    """Brackets are never markup, no control character is printed, and in a pipe no id is truncated."""
    service = await sandbox.service().start()
    event = sample()
    assert (await sandbox.deliver(service, event)).result == PROCESSED
    kind, error = "v2.core.account[configuration.merchant].updated", "PatternError: \\[/x] in [bold]"
    await sandbox.fetch("UPDATE firstclaim.stripe_events SET type = $1, last_error = $2", kind, error + "\x1b[2J")
    for arguments in (["list"], ["show", event.id]):
        run = await command("events", *arguments, COLUMNS="40")
        assert run.code == 0, run.output
        run.shows(event.id, kind, error + " [2J")


async def test_what_cannot_be_handled_is_not_replayed(sandbox: Sandbox, command: Command) -> None:
    """Without a payload, or locked by another transaction: exit 1 with the reason, and --wait waits for nothing."""
    service = await sandbox.service().start()
    event = sample()
    assert (await sandbox.deliver(service, event)).result == PROCESSED
    sandbox.waived.add(event.id)
    await sandbox.fetch("UPDATE firstclaim.stripe_events SET status = 'ignored'")
    async with sandbox.locked(event):
        run = await command("events", "replay", event.id, "--count", "1", "--wait")
        assert run.code == 1, run.output
        run.shows("0 events are due now", "1 event not replayed: changed in the meantime, or locked")
    await sandbox.fetch("DELETE FROM firstclaim.stripe_event_payloads")
    for arguments in ([event.id], ["--status", "ignored"]):
        run = await command("events", "replay", *arguments, "--count", "1", "--wait")
        assert run.code == 1, run.output
        run.shows("0 events selected", "1 more event cannot be replayed: the payload was pruned")


async def test_old_events_are_pruned(sandbox: Sandbox, command: Command) -> None:
    """A dry run announces what the next run deletes."""
    service = await sandbox.service().start()
    old, young = sample(), sample()
    for event in (old, young):
        assert (await sandbox.deliver(service, event)).result == PROCESSED
        sandbox.waived.add(event.id)
    await sandbox.fetch(
        "UPDATE firstclaim.stripe_events SET received_at = now() - interval '500 days',"
        " settled_at = now() - interval '500 days' WHERE event_id = $1",
        old.id,
    )
    run = await command("events", "prune", "--dry-run")
    run.shows("would delete 1 event with its payload, and 0 payloads of other events")
    assert await sandbox.row(old) is not None
    run = await command("events", "prune")
    assert run.code == 0, run.output
    run.shows("deleted 1 event with its payload, and 0 payloads of other events")
    assert await sandbox.row(old) is None
    assert await sandbox.row(young) is not None


async def test_a_rotation_is_noted(sandbox: Sandbox, command: Command) -> None:
    """The audit has the operator, and the epochs before and after."""
    run = await command("epoch", "rotate")
    assert run.code == 0, run.output
    [row] = await sandbox.fetch("SELECT action, selection FROM firstclaim.operator_actions")
    assert row["action"] == "rotate"
    assert row["selection"] in run.output
