"""Lock tokens: no attempt of any process gets the token of another one."""

import multiprocessing
import subprocess
import sys
import threading

from firstclaim.inbox.lock_token import new_token

DRAW = "from firstclaim.inbox.lock_token import new_token; print(*(new_token() for _ in range(100)))"


def draw(count: int) -> list[str]:
    """That many tokens of this process."""
    return [new_token() for _ in range(count)]


def test_threads_share_no_token() -> None:
    """Threads of one process that draw tokens at the same time get different ones."""
    drawn: list[str] = []
    threads = [threading.Thread(target=lambda: drawn.extend(draw(1000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 4000


def test_no_process_repeats_a_token() -> None:
    """Processes that start one after the other, or at once, have no token in common."""
    started = [subprocess.Popen([sys.executable, "-c", DRAW], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    drawn = [token for process in started for token in process.communicate(timeout=30)[0].split()] + draw(100)
    assert len(set(drawn)) == 300


def test_a_forked_process_repeats_no_token() -> None:
    """Processes that are forked from one that has drawn tokens have none in common with it, or with each other."""
    drawn = draw(10)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for tokens in pool.map(draw, [100] * 8, chunksize=1):
            drawn += tokens
    drawn += draw(100)
    assert len(set(drawn)) == 910
