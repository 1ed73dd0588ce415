"""`serve --reload`: a process that serves, and is replaced whenever a source file changes. For development only.

Guarantees: the port and the embedded servers are the parent's, so they stay through every change. A change stops the
process as SIGTERM does: it finishes or releases its events. A process that ends by itself, because a module cannot be
imported, say, is replaced at the next change. Only files are compared, by their time and size; nothing is imported in
the parent after the start.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import structlog

from firstclaim.shutdown import stop_signals

_POLL_SECONDS = 0.4
_KILL_SECONDS = 0.25  # after the process' own watchdog
_SKIPPED = {"__pycache__", "node_modules"}

Snapshot = dict[Path, tuple[int, int]]

log = structlog.get_logger(__name__)


class Reloader:
    """Runs `work()` in a process, which is spawned: `work` must be picklable. `watched` are files and folders.

    `stop_seconds` is the process' time to stop. `on_stop` is called in the handler of the first signal.
    """

    def __init__(
        self, work: Callable[[], None], watched: Iterable[Path], stop_seconds: float, on_stop: Callable[[], None]
    ) -> None:
        self._work = work
        self._watched = list(watched)
        self._stop_seconds = stop_seconds
        self._on_stop = on_stop
        self._stopping = False

    def run(self) -> None:
        """Serve until a signal."""
        for number in stop_signals():
            signal.signal(number, self._request_stop)
        # A file that is written twice in a second, at the same size, would else be taken from the cache.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        while not self._stopping:
            before = snapshot(self._watched)
            process = multiprocessing.get_context("spawn").Process(target=self._work)
            process.start()
            if changed := self._wait_for_change(process, before):
                log.info("reloading", path=str(changed))
            self._stop(process)

    def _request_stop(self, *_: object) -> None:
        if not self._stopping:
            self._stopping = True
            self._on_stop()

    def _wait_for_change(self, process: BaseProcess, before: Snapshot) -> Path | None:
        """The file that has changed; None: a signal came first."""
        is_reported = False
        while not self._stopping:  # looked at again after the wait: a signal to the group ends the process as well
            if process.is_alive():
                wait([process.sentinel], timeout=_POLL_SECONDS)
            else:
                if not is_reported:
                    log.warning("waiting_for_change", exit_code=process.exitcode)
                is_reported = True
                time.sleep(_POLL_SECONDS)
            now = snapshot(self._watched)
            if changed := [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]:
                return min(changed)
        return None

    def _stop(self, process: BaseProcess) -> None:
        if process.is_alive():
            process.terminate()
        process.join(self._stop_seconds + _KILL_SECONDS)
        if process.is_alive():
            log.error("worker_killed", pid=process.pid)
            process.kill()
        process.join()


def watched_paths(modules: Iterable[str], folder: Path) -> list[Path]:
    """The folder, and the packages and modules outside of it, unless they are installed."""
    site_folders = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    found = [folder.resolve()]
    for name in sorted({module.partition(".")[0] for module in modules} - {"firstclaim"}):
        spec = importlib.util.find_spec(name)
        places = list((spec and spec.submodule_search_locations) or [])
        if spec is not None and spec.origin and not places:
            places = [spec.origin]
        found += [Path(place).resolve() for place in places]
    outside = (path for path in found[1:] if not any(path.is_relative_to(each) for each in (found[0], *site_folders)))
    return [found[0], *outside]


def snapshot(watched: Iterable[Path]) -> Snapshot:
    """Time and size of each Python file."""
    found: Snapshot = {}
    for path in watched:
        for file in _python_files(path):
            try:
                status = file.stat()
            except OSError:  # deleted meanwhile
                continue
            found[file] = (status.st_mtime_ns, status.st_size)
    return found


def _python_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, folders, files in os.walk(path):
        here = Path(folder)
        folders[:] = [
            each
            for each in folders
            if not each.startswith(".") and each not in _SKIPPED and not (here / each / "pyvenv.cfg").exists()
        ]
        yield from (here / each for each in files if each.endswith(".py"))


def exit_with(faults: Iterable[str]) -> None:
    """End a process that cannot serve until a file changes, and say why on standard error."""
    for fault in faults:
        print(f"firstclaim: {fault}", file=sys.stderr)
    raise SystemExit(2)
