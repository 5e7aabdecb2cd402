"""Text at URLs: s3://, gs://, hf://, https:// and whatever else `fsspec` opens, streamed in constant memory.

Credentials come from the usual places of the library that talks to the store: s3fs, gcsfs, huggingface_hub, and for the
web the URL itself or ~/.netrc. Names, passwords and queries of URLs stay out of all that is printed or written.

A connection that breaks is opened again, and reading goes on at the byte reached.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from system.cli import shorten, without_secrets
from system.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Result = TypeVar("Result")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each new try. Bytes that arrive reset the tries."""
CONNECT_SECONDS, SILENT_SECONDS = 30, 60
"""A web server that takes longer to connect, or is silent for longer, counts as a broken connection."""
PIECE = 2**23
"""Bytes to ask a store for at a time."""
_WEB = ("http://", "https://")
_FINAL = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
    ImportError, LookupError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
"""Errors that another try does not mend."""


def is_url(text: str) -> bool:
    """Whether a text is a URL. One letter before the colon is a drive of Windows."""
    return re.match(r"[a-z][a-z0-9.+-]+://", text, re.IGNORECASE) is not None


def with_plain_path(text: str) -> str:
    """Returns a URL as it is, and a path as `Path` writes it: "a.txt" for "./a.txt"."""
    return text if is_url(text) else str(Path(text))


def require_no_url(path: Path) -> None:
    """Raises UserError if a path was a URL before `Path` joined its slashes: "https:/host"."""
    if re.match(r"[a-z][a-z0-9.+-]+:[/\\]", str(path), re.IGNORECASE) and not path.exists():
        raise UserError(
            f"{without_secrets(str(path))} is a URL, which only prepare_data.py and train.py read: "
            "download the file, and name its path"
        )


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL. Readers treat it as they treat a `Path`; as text, it is the URL without secrets."""

    url: str = field(repr=False)
    size: int | None = field(default=None, compare=False)
    """bytes; None if the server does not say"""
    file_system: Any = field(default=None, compare=False, repr=False)
    """of `fsspec`"""
    path: str = field(default="", compare=False, repr=False)
    """what the file system calls the file"""

    def __str__(self) -> str:
        return without_secrets(self.url)

    @property
    def _last_part(self) -> PurePosixPath:
        return PurePosixPath(unquote(urlsplit(self.url).path) if _is_web(self.url) else self.url)

    @property
    def name(self) -> str:
        """The name of the file: "a.jsonl.gz"."""
        return self._last_part.name

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return self._last_part.stem

    @property
    def suffix(self) -> str:
        """The last suffix: ".gz"."""
        return self._last_part.suffix

    def open(self, by_ranges: bool = False) -> IO[bytes]:
        """Opens the file, to be read from its beginning to its end.

        With `by_ranges` it can be sought in, and no more is fetched than is read; only a web server that cannot send
        ranges sends a stream all the same. Raises UserError, also while the file is read, if it cannot be had.
        """
        stream: Any
        if _is_web(self.url) and not (by_ranges and self._has_ranges()):
            return io.BufferedReader(_Stream(self), 2**20)
        stream = _Ranges(self)
        return stream if by_ranges else io.BufferedReader(stream, PIECE)

    def _has_ranges(self) -> bool:
        """Whether a web server sends the last byte alone if it is asked to."""
        size = self.size
        if not size:
            return False

        def ask() -> bool:
            with self.file_system.open(self.path, size=size, cache_type="none") as file:
                file.seek(size - 1)
                try:
                    file.read(1)
                except ValueError:  # it sent all
                    return False
                return True

        return _retried(ask, self)


def size_of(path: Path | RemoteFile) -> int | None:
    """Returns the size of a file in bytes, None if it is unknown."""
    return path.size if isinstance(path, RemoteFile) else path.stat().st_size


def find(url: str, is_text: Callable[[RemoteFile], bool]) -> set[RemoteFile]:
    """Returns the files that a URL names: a file, the matches of a glob, or the files in a folder that are text.

    A folder on the web ends in "/". It can be listed, or matched with a glob, if the server shows its links. Raises
    UserError if the URL names nothing, or if its package is missing.
    """
    shown = without_secrets(url)
    file_system, path = _file_system(url)

    def matches() -> dict[str, dict[str, Any]]:
        if re.search(r"[*[]", urlsplit(url).path) if is_web else re.search(r"[*?[]", path):
            return file_system.glob(path, detail=True, **thorough)
        if is_web and urlsplit(url).path.endswith("/"):
            return {path: {"type": "directory"}}
        return {path: file_system.info(path)}

    is_web = _is_web(url)
    thorough = {"on_error": "raise"} if is_web else {}  # otherwise a folder that fails is left out
    found: set[RemoteFile] = set()
    for name, info in _retried(matches, shown).items():
        entries = {name: info}
        is_folder = info["type"] == "directory"
        if is_folder:
            entries = _retried(partial(file_system.find, name, detail=True, **thorough), shown)
        for inner, facts in entries.items():
            file = RemoteFile(file_system.unstrip_protocol(inner), facts.get("size"), file_system, inner)
            if not is_folder or is_text(file):
                found.add(file)
    return found


def _is_web(url: str) -> bool:
    return url.lower().startswith(_WEB)


def _file_system(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and what it calls the file. Raises UserError if a package is missing."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    try:
        if _is_web(url):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
            options["client_kwargs"] = {"trust_env": True, "auto_decompress": False, "timeout": timeout}
            options["headers"] = {"Accept-Encoding": "identity"}  # the bytes of the file itself
        return url_to_fs(url, **options)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or "it"
        raise UserError(
            f"{without_secrets(url)} needs a package that is missing ({_reason(error)}): pip install {missing}"
        ) from None
    except Exception as error:  # whatever a library of `fsspec` raises
        raise UserError(f"cannot read {without_secrets(url)}: {_reason(error)}") from None


def _retried(action: Callable[[], Result], what: object) -> Result:
    """Returns what `action` returns, and tries again if the network fails. Raises UserError if it goes on failing."""
    for wait in (*WAITS, None):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # whatever a library of `fsspec` raises
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            if not _may_pass(cause):
                raise UserError(f"cannot read {what}: {_reason(cause)}") from None
            if wait is None:
                tries = len(WAITS) + 1
                raise UserError(f"cannot read {what}: {_reason(cause)}; tried {tries} times") from None
            print(f"{what}: {_reason(cause)}; trying again in {wait:g} s", file=sys.stderr)
        time.sleep(wait)
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    """Returns the status of HTTP in an error of aiohttp, httpx or requests."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed."""
    status = _status(error)
    if status:
        return status in (408, 425, 429) or status >= 500
    return not isinstance(error, _FINAL)


def _reason(error: BaseException) -> str:
    """Returns an error of a library on one line, without secrets."""
    status = _status(error)
    if status == 404 or isinstance(error, FileNotFoundError):
        return "no such file"
    if status:
        return f"HTTP status {status}{' (check your credentials)' if status in (401, 403) else ''}"
    return shorten(without_secrets(str(error)), 200) or type(error).__name__


class _Stream(io.RawIOBase):
    """A file on the web from beginning to end. After a break, it goes on at the byte reached."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.position, self.etag = file, 0, None
        self.response: Any = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = _retried(lambda: self._read(len(view)), self.file)
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _read(self, n: int) -> bytes:
        import aiohttp

        size = self.file.size
        try:
            if self.response is None:
                if self.position and self.position == size:
                    return b""  # all bytes came, the end did not
                self._connect()
            data = self.response.read(n)
            if not data and size is not None and self.position < size:
                raise ConnectionError(f"the connection ended after {self.position:,} of {size:,} bytes")
            return data
        except aiohttp.ClientPayloadError:  # its message is long
            self._disconnect()
            raise ConnectionError(f"the connection broke after {self.position:,} bytes") from None
        except Exception:
            self._disconnect()
            raise

    def _connect(self) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self.position:
            headers["Range"] = f"bytes={self.position}-"
        self.response = self.file.file_system.open(self.file.path, block_size=0, size=1, headers=headers)
        answer = self.response.r
        etag = answer.headers.get("ETag")
        if self.position and etag != self.etag:
            raise UserError(f"{self.file} changed while it was read: start again")
        self.etag = etag
        if self.position and answer.status != 206:  # it sends all, so skip what was read
            left = self.position
            while left:
                skipped = len(self.response.read(min(left, 2**20)))
                if not skipped:
                    raise ConnectionError(f"the connection ended before byte {self.position:,}")
                left -= skipped

    def _disconnect(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self._disconnect()
        super().close()


class _Ranges(io.RawIOBase):
    """A file that is read by ranges of bytes. A range that fails is fetched again from the byte reached."""

    def __init__(self, file: RemoteFile) -> None:
        if file.size is None:
            raise UserError(f"cannot read {file}: its size is unknown")
        self.file, self.size, self.position = file, file.size, 0
        self.handle: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fills the whole buffer, except at the end of the file."""
        view, n = memoryview(buffer).cast("B"), 0
        wanted = min(len(view), max(0, self.size - self.position))
        while n < wanted:
            data = _retried(partial(self._fetch, min(PIECE, wanted - n)), self.file)
            view[n : n + len(data)] = data
            n += len(data)
            self.position += len(data)
        return n

    def _fetch(self, n: int) -> bytes:
        try:
            if self.handle is None:
                size = {"size": self.size} if _is_web(self.file.url) else {}
                self.handle = self.file.file_system.open(self.file.path, cache_type="none", **size)
            self.handle.seek(self.position)
            data = self.handle.read(n)
            if not data:
                raise ConnectionError(f"the store sent nothing at byte {self.position:,} of {self.size:,}")
            return data
        except Exception:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if self.handle is not None:
            self.handle.close()
            self.handle = None

    def close(self) -> None:
        self._disconnect()
        super().close()
