"""The `firstclaim` command: it parses, calls and prints, and decides nothing.

Exit codes: 0 success · 1 the command ran, and its result is negative (`send` or `load` saw an event processed twice) ·
2 the command line, a setting or a handler module is invalid · 3 a store is unreachable, unsuitable or not migrated.

Each command imports what it needs when it runs: `--version` and `--help` load no driver, no server and no settings.
"""

import os
import sys
from importlib.metadata import version

_VERSION = f"firstclaim {version('firstclaim')}"


def main() -> None:
    """The console script."""
    if sys.argv[1:] == ["--version"]:  # without Typer, whose import takes longer than everything else here
        print(_VERSION)
        return
    if sys.argv[1:] == ["livez"]:  # a container runs it every few seconds
        from firstclaim.cli.livez import livez

        sys.exit(livez())
    sys.path.insert(0, os.getcwd())  # handler modules in the current folder, as with `python -m`
    from firstclaim.cli.commands import app
    from firstclaim.cli.environment import whole_command

    with whole_command():
        app()
