"""The schema of the ledger's tables: its default name, and the names that it can have."""

import re

DEFAULT_SCHEMA = "firstclaim"

_NAME = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,62}")
_SHARED = ("public", "information_schema")


def checked_schema(name: str) -> str:
    """`name`, if it can be the name of a schema of ours. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "expected a name of up to 63 lower-case letters, digits and underscores that does not begin with a digit "
            "or with pg_, e.g. firstclaim"
        )
    if name in _SHARED:
        raise ValueError(f"the ledger needs a schema of its own, and {name} is none: your own migrations look there")
    return name
