# The tasks of this repository; `just --list` shows them. Needs the virtual environment of the README's test command.

bin := ".venv/bin"

# The README's test command: unit and integration tests, and the smoke set of real processes
test *arguments:
    {{bin}}/python -m pytest -n 3 --dist worksteal {{arguments}}

# Types, style, and the layers' contract
check:
    {{bin}}/mypy
    {{bin}}/ruff check service tests
    {{bin}}/ruff format --check service tests
    {{bin}}/lint-imports --no-logo

# The pages in docs/, as HTML in build/docs; a link to nowhere is an error
docs:
    {{bin}}/sphinx-build -W --keep-going docs build/docs

# Fix what ruff can fix
format:
    {{bin}}/ruff check --fix service tests
    {{bin}}/ruff format service tests

# The long run: the rest of the acceptance suite, the fault matrix, the browser, the model, the mutants
long: acceptance alone mutants

# Real processes, real servers broken on purpose, the model and the browser, in six lanes
acceptance *arguments:
    {{bin}}/python -m pytest -n 6 --dist worksteal -m '(acceptance or chaos or model or browser) and not alone' {{arguments}}

# Those of them that measure time, one after the other
alone *arguments:
    {{bin}}/python -m pytest -m alone {{arguments}}

# Every rule of the protocol broken in a copy of the code, and the test that must fail (eight at once by itself)
mutants *arguments:
    {{bin}}/python -m pytest -m mutants {{arguments}}

# Workflows, Kubernetes manifest and compose file against their schemas
schemas:
    bash .ci/schemas

# All of a release but its publication: sdist, wheel, SBOM, and the shop's tests on a clean installation
package *arguments:
    bash .ci/release {{arguments}}

# The integration tests on another PostgreSQL, 14 to 18, as a role that is no superuser: `just postgres 17.10.0-beta.17`
postgres *arguments:
    bash .ci/postgres {{arguments}}

# The same on another Redis or Valkey: `just redis redis-7`, `redis-8` or `valkey-8`
redis *arguments:
    bash .ci/redis {{arguments}}

# What depends on a store's version, on all of these
versions:
    bash .ci/versions

# Everything that CI runs
ci:
    bash .ci/run
