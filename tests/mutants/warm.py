"""A process that has imported the libraries, and forks for each run of pytest: a script, not to be imported.

Guarantees: nothing of the service or its tests is imported here, so a fork knows only the copy in whose folder it
runs. Importing the libraries took most of a mutant's time; a fork has them already.

Each line of standard input is a JSON list: the folder, the database that the tests clone (empty: they make one), and
pytest's arguments. The reply is a line with pytest's exit code. Its output is in the file `output` of that folder.
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
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of the processes that a test starts
    os.environ["TEST_TEMPLATE"] = template
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 3  # of an internal error of pytest
    try:
        code = int(import_module("pytest").main(list(arguments)))
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    for name in FOREIGN:
        import_module(name)
    gc.freeze()  # garbage collections in a fork then skip what was imported here
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
