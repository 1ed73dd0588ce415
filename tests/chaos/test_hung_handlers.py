"""Row 45: a handler that never returns, in a thread: it stops no other event, and an operator finds out which it is."""

from pathlib import Path

from tests.acceptance.harness import FAILED, Overrides, eventually, sample
from tests.chaos.actions import answered, deliver_at_once
from tests.chaos.history import History
from tests.chaos.verdict import verdict

IN_THREAD = "invoice.paid"  # the type of the sync handler
# A deadline that a test can wait for, and a lease below it.
SETTINGS: Overrides = {
    "handler_slots": 2,
    "lease_seconds": 1,
    "lock_ttl_seconds": 1,
    "handler_deadline_seconds": 4,
    "idle_in_transaction_seconds": 8,
    "answer_budget_seconds": 0.5,
}


async def test_row_45_a_handler_that_hangs(history: History, tmp_path: Path) -> None:
    """It and five good events are abandoned by a crash: all good ones complete; /readyz names it, then /livez fails."""
    service = await history.service(SETTINGS | {"handler_slots": 6}).start()
    gates = [tmp_path / "bad", tmp_path / "good"]
    bad = sample("hold", IN_THREAD, gate=str(gates[0]))
    good = [sample("hold", IN_THREAD, gate=str(gates[1])) for _ in range(5)]
    await deliver_at_once(history, [(service, event) for event in (bad, *good)])
    await service.kill()
    gates[1].touch()

    service = await history.service(SETTINGS).start()
    rows = await history.sandbox.all_settled(good)
    assert {row.abandoned for row in rows} == {1}
    await eventually(lambda: history.sandbox.row(bad), lambda row: row is not None and row.abandoned >= 2)
    line = (await service.get("/readyz")).text.splitlines()[-1]
    assert bad.id in line, line
    assert (await service.get("/livez")).status_code == 200
    other = sample("hold", IN_THREAD, gate=str(gates[0]))
    assert (await answered(history, service, other)).status in (FAILED[0], 202)
    await eventually(lambda: service.get("/livez"), lambda answer: answer.status_code == 503)

    await service.kill()
    gates[0].touch()
    await history.service(SETTINGS).start()
    await history.sandbox.all_settled([bad, other])
    await verdict(history)
