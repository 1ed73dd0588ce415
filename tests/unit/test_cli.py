"""The command line loads what a command needs, when it runs: asking for help or the version costs little."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.core import TyperGroup

from firstclaim.cli import load
from firstclaim.cli.commands import app
from firstclaim.loadtest.plan import IN_FLIGHT_MOST

# Not Pydantic: Typer itself loads it where it is installed.
HEAVY = {"alembic", "asyncpg", "httpx", "orjson", "redis", "sqlalchemy", "starlette", "stripe", "structlog", "uvicorn"}
# At most this many modules: Python's own, and ours. More of them are slower to load.
VERSION_MODULES_MOST = 190
HELP_MODULES_MOST = 480
# Typer keeps the line breaks of a paragraph: longer lines would break twice on a terminal of 80 columns.
HELP_COLUMNS_MOST = 76

# Runs the command once for each list of arguments, and reports which modules each of them added.
LOADED = """
import json, sys
from firstclaim.cli.main import main
reports = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["firstclaim", *arguments]
    try:
        main()
    except SystemExit as exit:
        assert not exit.code, exit.code
    reports.append(sorted(sys.modules))
print(json.dumps(reports), file=sys.stderr)
"""


def loaded_by(*commands: list[str]) -> tuple[str, list[set[str]]]:
    """What these commands print in a new process, and the modules that are loaded after each of them."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [set(modules) for modules in json.loads(done.stderr)]


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def commands(group: TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each command and group of commands, with its help."""
    yield path, group.help or ""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command.help or ""


ROOT = typer.main.get_command(app)
assert isinstance(ROOT, TyperGroup)
HELP = dict(commands(ROOT))


def test_the_version_loads_next_to_nothing() -> None:
    """`--version` answers without Typer: in a fifth of a second instead of more than one."""
    printed, [modules] = loaded_by(["--version"])
    assert printed.startswith("firstclaim ")
    assert not packages(modules) & {*HEAVY, "asyncio", "pydantic", "rich", "typer"}
    assert len(modules) <= VERSION_MODULES_MOST


def test_help_loads_no_driver_and_no_server() -> None:
    """The help of each command needs neither the stores' drivers, nor the server, nor the settings, nor asyncio."""
    printed, after = loaded_by(*([*path, "--help"] for path in HELP))
    for path, modules in zip(HELP, after, strict=True):
        assert f"Usage: {' '.join(('firstclaim', *path))} " in printed
        assert not packages(modules) & {*HEAVY, "asyncio"}, path
        assert "firstclaim.settings" not in modules, path
        assert len(modules) <= HELP_MODULES_MOST, path


@pytest.mark.parametrize("path", HELP, ids=lambda path: " ".join(path) or "firstclaim")
def test_help_fits_a_terminal(path: tuple[str, ...]) -> None:
    """Each command has a help text, and no paragraph of several lines has one that a terminal would wrap."""
    assert HELP[path]
    for paragraph in HELP[path].split("\n\n"):
        lines = paragraph.splitlines()
        assert len(lines) == 1 or max(map(len, lines)) <= HELP_COLUMNS_MOST, paragraph


def test_the_load_generators_limit_is_the_commands() -> None:
    """The limit that `firstclaim load --help` shows without loading the generator is the generator's own."""
    assert load._USERS_MOST == IN_FLIGHT_MOST
