"""The address of the archive of payloads: what is refused before anything is stored."""

import re
from pathlib import Path
from urllib.parse import unquote

from firstclaim.urls.parts import split, split_url

EXAMPLE = "s3://bucket/prefix or file:///srv/archive"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


def archive_url(url: str) -> str:
    """`url`, if it names a bucket or a folder. Raises ValueError."""
    parts = split_url(url, EXAMPLE)
    if parts.scheme not in ("s3", "file"):
        raise ValueError(f"expected {EXAMPLE}")
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            "expected no key and no parameter in the URL: they are taken from AWS_ACCESS_KEY_ID and the like"
        )
    if parts.scheme == "s3" and not _BUCKET.fullmatch(parts.netloc):
        raise ValueError("expected the name of a bucket after s3://, in lower case")
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ValueError("expected the whole path of a folder after file://, e.g. file:///srv/archive")
    return parts.geturl().rstrip("/")


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Of a checked `s3://` address."""
    parts = split(url)
    return parts.netloc, unquote(parts.path).strip("/")


def folder(url: str) -> Path | None:
    """Of a checked `file://` address; None: it is none."""
    parts = split(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None
