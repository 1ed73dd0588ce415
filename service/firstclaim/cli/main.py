"""The `firstclaim` command: parses, calls, prints; decides nothing.

Exit codes: 0 done · 1 the command ran and its answer is no (`send` or `load` saw an event processed twice) · 2 the
command line, a setting or a handler module is wrong · 3 a store is unreachable, unsuited, or not migrated.

Each command imports what it needs when it runs: `--version` and `--help` load no driver, no server and no settings.
"""

import os
import sys
from importlib.metadata import version

_VERSION = f"firstclaim {version('firstclaim')}"


def main() -> None:
    """The console script."""
    if sys.argv[1:] == ["--version"]:  # without Typer, which takes longer than all the rest of it
        print(_VERSION)
        return
    sys.path.insert(0, os.getcwd())  # handler modules beside you, as `python -m` would find them
    from firstclaim.cli.commands import app

    app()
