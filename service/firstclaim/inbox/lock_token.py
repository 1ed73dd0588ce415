"""Lock tokens: each lock attempt has a value that no other attempt of any process has.

Guarantees: a process never mistakes an earlier lock of its own for the current one, and never a lock of another process
for its own. A token is a prefix, drawn at random when the process starts, and a number. A process that was forked draws
a prefix of its own: with its parent's, both would count on from the same number, and each would take the other's lock
for its own. (A random token for each attempt is as unique, but costs a system call.)
"""

import itertools
import os
import secrets

_PREFIX_BYTES = 8


class _Tokens:
    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Begin with a new prefix."""
        self._prefix = secrets.token_hex(_PREFIX_BYTES)
        self._numbers = itertools.count()

    def new(self) -> str:
        """The next token. May be called by any thread."""
        return f"{self._prefix}{next(self._numbers):x}"


_tokens = _Tokens()


def new_token() -> str:
    """A token that no other lock attempt has."""
    return _tokens.new()
