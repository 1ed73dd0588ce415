"""A process that has imported what is not ours, and forks for each run of pytest: a script, not to be imported.

Guarantees: of the service and its tests nothing is imported here, so a fork knows only the copy in whose folder
it runs. Importing the rest took most of a mutant's time; a fork has it already.

Each line of standard input is a JSON list: the folder, the database that the tests clone (empty: they make one), and
pytest's arguments. Each is answered with pytest's exit code on a line of its own. Its output is in the file `said` of
that folder.
"""

import gc
import json
import os
import sys
from importlib import import_module

FOREIGN = (
    "alembic.autogenerate",
    "alembic.command",
    "asyncpg",
    "httpx",
    "hypothesis.strategies",
    "itsdangerous",
    "jinja2.environment",
    "opentelemetry.propagate",
    "opentelemetry.trace.propagation.tracecontext",
    "orjson",
    "prometheus_client",
    "pydantic_settings",
    "pytest",
    "pytest_asyncio",
    "pytest_timeout",
    "redis.asyncio",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.ext.asyncio",
    "starlette.applications",
    "stripe",
    "structlog",
    "typer",
    "uvicorn.protocols.http.httptools_impl",
)


def run(folder: str, template: str, *arguments: str) -> int:
    """Run pytest in the folder, in a fork; return its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    paths = [os.path.join(folder, "service"), folder]
    sys.path[0:1] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the processes that a test starts
    os.environ["TEST_TEMPLATE"] = template
    said = os.open("said", os.O_CREAT | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(said, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 3  # pytest's own word for an internal error
    try:
        code = int(import_module("pytest").main(list(arguments)))
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    for name in FOREIGN:
        import_module(name)
    gc.freeze()  # a fork's collections leave alone what all forks share
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
