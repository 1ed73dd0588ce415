"""Where the archive's files are: a bucket of S3-compatible storage, or a folder.

Guarantees: when `put` returns, the file is stored, whole, under its name, and survives a power failure as far as the
storage promises that: S3 answers when it has stored the object, whose checksum it has compared; a file in a folder is
flushed to the disk, then renamed, then its folders are flushed. A file that is put again under its name replaces the
same bytes. Every error is an `ArchiveUnavailable` or a `ConfigurationError`, which says what to change.
"""

import asyncio
import os
import re
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from firstclaim.errors import ArchiveUnavailable, ConfigurationError
from firstclaim.urls.archive import bucket_and_prefix, folder

_CONNECT_SECONDS = 5
_REQUEST_SECONDS = 120  # for a file of some megabytes over a slow line
_RETRIES = 4
_RETRY_SECONDS = 60
_S3_ERROR = re.compile(r"<Code>([^<]*)</Code>(?:\s*<Message>([^<]*)</Message>)?")
_HINTS = {
    "NoSuchBucket": "create the bucket, or correct the address",
    "AccessDenied": "allow s3:PutObject, s3:GetObject and s3:ListBucket there",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY, and AWS_REGION",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
}
_NO_ANSWER = "check AWS_ENDPOINT_URL, AWS_REGION and the network"
_NO_CREDENTIALS = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class Storage(Protocol):
    """Files by name; `/` separates the parts of a name."""

    async def put(self, name: str, content: bytes) -> None:
        """Store the file. When this returns, it is stored."""

    async def names(self, prefix: str) -> list[str]:
        """The names below `prefix/`, in order."""

    async def get(self, name: str) -> bytes:
        """The file's content."""


def open_storage(url: str) -> Storage:
    """The storage at a checked address. Opens nothing yet. Raises `ConfigurationError`."""
    path = folder(url)
    return FolderStorage(path) if path else S3Storage(url)


class FolderStorage:
    """A folder of this machine, or one that is mounted there. It is made if its parent is there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def put(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        try:
            await asyncio.to_thread(self._put, name, content)
        except OSError as error:
            raise self._failure(error) from error

    async def names(self, prefix: str) -> list[str]:
        """See `Storage`."""
        try:
            return await asyncio.to_thread(self._names, prefix)
        except OSError as error:
            raise self._failure(error) from error

    async def get(self, name: str) -> bytes:
        """See `Storage`."""
        try:
            return await asyncio.to_thread((self._path / name).read_bytes)
        except OSError as error:
            raise self._failure(error) from error

    def _put(self, name: str, content: bytes) -> None:
        if not self._path.exists():  # not its parents: a disk that is not mounted is no folder to be made
            self._path.mkdir(mode=0o700)
            _flush(self._path.parent)
        path = self._path / name
        missing = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
            _flush(each.parent)
        handle, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)  # readable by our user alone
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
        _flush(path.parent)

    def _names(self, prefix: str) -> list[str]:
        os.stat(self._path)
        found = (self._path / prefix).glob("**/*")
        return sorted(
            str(each.relative_to(self._path)) for each in found if each.is_file() and not each.name.startswith(".")
        )

    def _failure(self, error: OSError) -> ArchiveUnavailable:
        return ArchiveUnavailable(f"{error.filename or self._path}: {error.strerror or error}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class S3Storage:
    """A bucket, by obstore. What it needs to know besides the bucket it takes from `AWS_...`, or from the machine."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError:
            raise ConfigurationError(
                ["an archive at s3:// needs the package obstore: pip install 'firstclaim[archive]'"]
            ) from None
        bucket, prefix = bucket_and_prefix(url)
        self._url = url
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        try:
            self._store: S3Store = S3Store(
                bucket,
                prefix=prefix or None,
                client_options={
                    "allow_http": endpoint.startswith("http://"),  # nobody types that by mistake
                    "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                    "timeout": timedelta(seconds=_REQUEST_SECONDS),
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
                **options,
            )
        except Exception as error:
            raise ConfigurationError([f"the archive's storage: {_first_line(error)}"]) from error

    async def put(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        try:
            await self._store.put_async(name, content)
        except Exception as error:
            raise self._failure(error) from error

    async def names(self, prefix: str) -> list[str]:
        """See `Storage`."""
        try:
            return sorted([each["path"] async for chunk in self._store.list(prefix) for each in chunk])
        except Exception as error:
            raise self._failure(error) from error

    async def get(self, name: str) -> bytes:
        """See `Storage`."""
        try:
            return bytes(await (await self._store.get_async(name)).bytes_async())
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> ArchiveUnavailable:
        said = str(error)
        if found := _S3_ERROR.search(said):
            code, message = found[1], found[2] or ""
            hint = _HINTS.get(code, "see the storage's documentation of this code")
            return ArchiveUnavailable(f"{self._url}: {code} ({message.rstrip('.') or 'no message'}): {hint}")
        if "169.254." in said:  # it has asked the machine for credentials, because the environment has none
            return ArchiveUnavailable(f"{self._url}: {_NO_CREDENTIALS}")
        return ArchiveUnavailable(f"{self._url}: {_first_line(error)}: {_NO_ANSWER}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__
