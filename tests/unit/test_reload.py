"""`serve --reload`: what is said when it stops."""

import os
import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import signal
from firstclaim.server.reload import Reloader

def work():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("ready", flush=True)
    while True:
        signal.pause()

if __name__ == "__main__":
    Reloader(work, [], 1.0, lambda: None).run()
"""
_SECONDS = 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_both_processes_is_no_end_by_itself(number: signal.Signals, tmp_path: os.PathLike[str]) -> None:
    """Ctrl-C, and SIGTERM to the group, end the process that serves at once: it is not said to wait for a change."""
    program = os.path.join(tmp_path, "program.py")
    with open(program, "w") as file:
        file.write(_PROGRAM)
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)
        written, _ = process.communicate(timeout=_SECONDS)
    assert (process.returncode, written) == (0, "")
