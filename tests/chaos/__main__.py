"""`python -m tests.chaos --seed S --minutes M`: a nemesis run. Exit code 0 if no invariant was violated, else 1."""

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.chaos.nemesis import Result, run

_MINUTES_MOST: Final = 60.0


def arguments(given: list[str]) -> argparse.Namespace:
    """Seed and minutes. Anything else ends with a message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="default: a random one")
    parser.add_argument("--minutes", type=float, default=2.0, help="of faults; recovery and checks come after them")
    chosen = parser.parse_args(given)
    if not 0 < chosen.minutes <= _MINUTES_MOST:
        parser.error(f"--minutes {chosen.minutes:g}: more than 0 and at most {_MINUTES_MOST:g}")
    return chosen


class _LiveLine:
    """On a terminal, one line that is overwritten; elsewhere, every fifth line."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, line: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\033[K{line[:200]}", end="", flush=True)
        elif self._count % 5 == 0:
            print(line, flush=True)
        self._count += 1


def _print(result: Result) -> None:
    print()
    for title, counted in result.tables():
        print(f"\n{title}")
        for name, times in counted.items():
            print(f"  {times:7}  {name}")


async def _interruptible(seed: int, minutes: float, folder: Path) -> Result:
    """SIGTERM ends the run as Ctrl-C does, through every `finally`, so that no server and no service is left."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(seed, minutes, folder, _LiveLine())


def main(given: list[str]) -> int:
    """Run, and print the result."""
    chosen = arguments(given)
    print(f"seed {chosen.seed}, {chosen.minutes:g} minutes of faults", flush=True)
    with tempfile.TemporaryDirectory(prefix="firstclaim-nemesis-") as folder:
        try:
            result = asyncio.run(_interruptible(chosen.seed, chosen.minutes, Path(folder)))
        except (asyncio.CancelledError, KeyboardInterrupt):
            print(f"\nseed {chosen.seed}: interrupted, nothing was checked")
            return 1
        _print(result)
        if result.violations:
            print(f"\n{result.story()}")
    print(f"\nseed {result.seed}: {'an invariant was violated' if result.violations else 'no invariant was violated'}")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
