"""The command line loads what a command needs, when it runs: asking for help or the version costs little."""

import json
import os
import subprocess
import sys

import pytest

from firstclaim.cli import load
from firstclaim.loadtest.plan import IN_FLIGHT_MOST

# Not Pydantic: Typer itself loads it where it is installed.
HEAVY = {"alembic", "asyncpg", "httpx", "orjson", "redis", "sqlalchemy", "starlette", "stripe", "structlog", "uvicorn"}
LOADED = """
import atexit, json, os, sys
report = os.dup(2)
atexit.register(lambda: os.write(report, json.dumps(sorted({name.partition(".")[0] for name in sys.modules})).encode()))
sys.argv = ["firstclaim", *sys.argv[1:]]
from firstclaim.cli.main import main
main()
"""
COMMANDS = [
    [],
    ["serve"],
    ["migrate"],
    ["check"],
    ["send"],
    ["load"],
    ["events"],
    ["events", "list"],
    ["events", "show"],
    ["events", "replay"],
    ["events", "prune"],
    ["stats"],
    ["reconcile"],
    ["epoch", "rotate"],
    ["dashboard"],
    ["admin-password"],
]


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What `firstclaim` with these arguments prints, and the packages that it loads."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, set(json.loads(done.stderr))


def test_the_version_loads_next_to_nothing() -> None:
    """`--version` answers without Typer: in a fifth of a second instead of more than one."""
    printed, loaded = loaded_by("--version")
    assert printed.startswith("firstclaim ")
    assert not loaded & {*HEAVY, "asyncio", "pydantic", "rich", "typer"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_loads_no_driver_and_no_server(command: list[str]) -> None:
    """The help of each command needs neither the stores' drivers, nor the server, nor the settings."""
    printed, loaded = loaded_by(*command, "--help")
    assert "Usage: firstclaim" in printed
    assert not loaded & HEAVY


def test_the_load_generators_limit_is_the_commands() -> None:
    """The limit that `firstclaim load --help` shows without loading the generator is the generator's own."""
    assert load._USERS_MOST == IN_FLIGHT_MOST
