"""A process that forks for each run of pytest, and imports the libraries for the next ones: a script, not a module.

Guarantees: nothing of the service or its tests is imported here, so a fork knows only the copy in whose folder it
runs. A fork reports the libraries that it has imported, and this process imports them too: the next fork has them
already. Importing them took most of a mutant's time.

Each line of standard input is a JSON list: the folder, the database that the tests clone (empty: they make one), and
pytest's arguments. The reply is a line with pytest's exit code. Its output is in the file `output` of that folder.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterable
from importlib import import_module

sys.path.pop(0)  # this script's folder


class OnlyNamed:
    """A plugin of pytest: of a module's tests it collects those that an argument names. Another costs a millisecond."""

    def __init__(self, arguments: Iterable[str]) -> None:
        ids = [argument.partition("[")[0].split("::")[1:] for argument in arguments]
        self._names = {name for parts in ids for name in parts}

    def pytest_pycollect_makeitem(self, name: str) -> list[object] | None:
        """Nothing for a test that is not named; None: pytest's own way."""
        return None if name in self._names or not name.startswith("test") else []


def run(folder: str, template: str, *arguments: str) -> int:
    """Run pytest in the folder, in a fork; return its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    paths = [os.path.join(folder, "service"), folder]
    sys.path[0:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of the processes that a test starts
    os.environ["TEST_TEMPLATE"] = template
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 3  # of an internal error of pytest
    try:
        code = int(import_module("pytest").main(list(arguments), [OnlyNamed(arguments)]))
        sys.stdout.flush()
        with open("libraries", "w") as file:
            json.dump(libraries(folder), file)
    finally:
        os._exit(code)


def libraries(folder: str) -> list[str]:
    """The names of the imported modules that are not in the folder, in the order of their import."""
    specs = [(name, getattr(module, "__spec__", None)) for name, module in sys.modules.items()]
    return [name for name, spec in specs if spec and spec.origin and not spec.origin.startswith(folder)]


def import_libraries(folder: str) -> None:
    """Import what the fork that ran in the folder has imported, if it came to its end.

    In the same order: whoever imports `_asyncio` before `asyncio` has it initialised twice, and tasks do not know
    themselves.
    """
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "libraries")) as file:
        for name in json.load(file):
            with contextlib.suppress(Exception):
                import_module(name)
    gc.freeze()  # garbage collections in a fork then skip what was imported here


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        code = run(*request)
        import_libraries(request[0])
        print(code, flush=True)
