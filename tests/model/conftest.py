"""What every search needs."""

import os
import shutil

import pytest

_MISSING = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]


@pytest.fixture
def tools() -> None:
    """Without the tools nothing is proved: a failure in CI, a skip elsewhere."""
    if _MISSING:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"not installed: {' and '.join(_MISSING)}; run: apt-get install spin gcc")
