"""`firstclaim events prune` as it is called, without a ledger."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from typer.testing import CliRunner

from firstclaim.cli import prune as cli_prune
from firstclaim.cli.commands import app
from firstclaim.operations import prune as prune_module
from firstclaim.operations.prune import Pruned


@pytest.mark.parametrize(("options", "busy_percent"), [([], 10), (["--busy-percent", "40"], 40)])
def test_a_prune_is_paced_and_does_not_count_first(
    monkeypatch: pytest.MonkeyPatch, options: list[str], busy_percent: int
) -> None:
    """What is to be deleted is counted for a dry run alone, because that reads all of it at once, without a rest."""
    given: list[float] = []

    async def prune(*_: object, busy_percent: float) -> AsyncIterator[Pruned]:
        given.append(busy_percent)
        yield Pruned(payloads=3)
        yield Pruned(payloads=1)

    def run_on_ledger(_: object, work: Callable[[None], Awaitable[Pruned]]) -> Pruned:
        async def run() -> Pruned:
            return await work(None)

        return asyncio.run(run())

    monkeypatch.setattr("firstclaim.observability.logging.configure", lambda *_: None)
    monkeypatch.setattr(prune_module, "prune", prune)
    monkeypatch.setattr(prune_module, "count_prunable", None)
    monkeypatch.setattr(cli_prune, "run_on_ledger", run_on_ledger)
    environment = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none", "FIRSTCLAIM_ARCHIVE_URL": None}
    done = CliRunner().invoke(app, ["events", "prune", *options], env=environment)
    assert done.exit_code == 0, done.output
    assert "4 payloads of other events" in done.output
    assert given == [busy_percent]
