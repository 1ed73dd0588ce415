"""The path of a source file as its author knows it: below the folder that it is imported from.

Guarantees: the log, the ledger, notices and the page name a file in the same way, without the machine's folders.
"""

import os
import sys
from functools import cache


@cache
def source_path(path: str) -> str:
    """`shop/handlers.py`, for the whole path of a file. The path itself if nothing is imported from its folders."""
    folders = [os.path.join(os.path.abspath(each), "") for each in sys.path]
    within = [each for each in folders if path.startswith(each)]
    return path[len(max(within, key=len)) :] if within else path
