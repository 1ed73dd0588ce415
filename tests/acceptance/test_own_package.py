"""An application may have a package named `service`, which is a common name: firstclaim does not shadow it."""

import os
from pathlib import Path

import pytest

from tests.acceptance.harness import PYTHON_PATH, Sandbox, sample

HELPERS = """
ACTION = "billed_by_our_own_service"
EFFECT = "INSERT INTO effects (event_id, attempt, pid, xid) VALUES ($1, $2, 0, pg_current_xact_id()::text)"
"""
BILLING = """
from firstclaim import Context, Event, on
from service.helpers import ACTION, EFFECT


@on("invoice.payment_failed")
async def bill(event: Event, context: Context) -> str:
    await context.fetch(EFFECT, event.id, context.attempt)
    return ACTION
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an application whose package is named `service`."""
    package = tmp_path / "shop" / "service"
    package.mkdir(parents=True)
    for name, text in {"__init__": "", "helpers": HELPERS, "billing": BILLING}.items():
        (package / f"{name}.py").write_text(text)
    return package.parent


@pytest.mark.smoke
async def test_handlers_are_served_from_a_package_named_service(sandbox: Sandbox, shop: Path) -> None:
    """The handler module and its imports are the application's own, and its handler processes the event."""
    path = os.pathsep.join((str(shop), PYTHON_PATH))
    service = await sandbox.service({"PYTHONPATH": path, "handlers": "service.billing"}).start()
    answer = await sandbox.deliver(service, sample())
    assert answer.result == (200, True, "billed_by_our_own_service")
    assert await service.stop() == 0
