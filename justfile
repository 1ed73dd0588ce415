# The tasks of this repository; `just --list` shows them. Needs the virtual environment of the README's test command.

bin := ".venv/bin"

# The README's test command: unit and integration tests, and the smoke set of real processes
test *arguments:
    {{bin}}/python -m pytest -n 2 --dist worksteal {{arguments}}

# Types, style, and the layers' contract
check:
    {{bin}}/mypy
    {{bin}}/ruff check service tests
    {{bin}}/ruff format --check service tests
    {{bin}}/lint-imports --no-logo

# Fix what ruff can fix
format:
    {{bin}}/ruff check --fix service tests
    {{bin}}/ruff format service tests

# The long run: the rest of the acceptance suite, the fault matrix, the browser, the model, the mutants
long: acceptance alone mutants

# Real processes, real servers broken on purpose, the model and the browser, in three lanes
acceptance *arguments:
    {{bin}}/python -m pytest -n 3 --dist worksteal -m '(acceptance or chaos or model or browser) and not alone' {{arguments}}

# Those of them that measure time, one after the other
alone *arguments:
    {{bin}}/python -m pytest -m alone {{arguments}}

# Every rule of the protocol broken in a copy of the code, and the test that must fail (two at once by itself)
mutants *arguments:
    {{bin}}/python -m pytest -m mutants {{arguments}}

# Everything that CI runs
ci:
    bash .ci/run
