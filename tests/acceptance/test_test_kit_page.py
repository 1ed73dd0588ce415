"""The files of the page on tests work as they stand, on the embedded PostgreSQL, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.acceptance.harness import PYTHON_PATH
from tests.blocks import block

PAGE = "docs/how-to/test-handlers.md"


def run_tests(folder: Path, *arguments: str) -> str:
    """The output of pytest in `folder`; fails unless all tests pass."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TEST_"))}
    environment["DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/must_not_be_used"
    # Every warning is an error, but pytest-asyncio's own one about an option that is not set.
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": PYTHON_PATH.split(os.pathsep)[0]},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_s_files_pass_its_own_command(tmp_path: Path) -> None:
    """Every file of the page is written as it stands, and its tests pass in pytest-asyncio's default mode."""
    (tmp_path / "shop.py").write_text(block(PAGE, "shop.py"))
    (tmp_path / "conftest.py").write_text(block(PAGE, "conftest.py"))
    (tmp_path / "test_shop.py").write_text(block(PAGE, "test_shop.py"))
    (tmp_path / "test_shop_sync.py").write_text(block(PAGE, "test_shop_sync.py"))
    assert "4 passed" in run_tests(tmp_path)
