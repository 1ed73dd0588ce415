"""How the worker processes of one `serve` come up."""

from pathlib import Path

from tests.acceptance.harness import PROCESSED, PYTHON_PATH, Sandbox, sample

# Run by every interpreter that starts with it on its path; only workers are spawned.
LATE = """
import sys, time
if any("spawn_main" in argument for argument in sys.orig_argv):
    time.sleep(6)
"""


async def test_workers_that_start_slowly(sandbox: Sandbox, tmp_path: Path) -> None:
    """Workers that need 6 s to come up, as on a busy machine, come up: their supervisor does not kill them for it."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    service = await sandbox.service({"PYTHONPATH": f"{tmp_path}:{PYTHON_PATH}"}, workers=2).start()
    assert (await sandbox.deliver(service, sample())).result == PROCESSED
    assert "died" not in service.output
    assert await service.stop() == 0
