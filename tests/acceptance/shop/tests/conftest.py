"""The tests' database: that of firstclaim's fixture, with the shop's own migrations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def firstclaim_database_url(firstclaim_database_url: str) -> str:
    environment = {**os.environ, "SHOP_DATABASE_URL": firstclaim_database_url}
    shop = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], cwd=shop, env=environment, check=True)
    return firstclaim_database_url
