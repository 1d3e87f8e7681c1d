"""Files that are replaced atomically, JSON objects with a checksum, and locks on directories."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedbn.errors import UserError

CHECKSUM = "crc32"
"""Key of the checksum in a JSON object."""

LOCK = ".lock"
"""Name of the lock file in a results directory. The operating system releases the lock when its owner ends."""


def replace_file(path: Path, data: bytes, backup: Path | None = None) -> None:
    """Replace a file atomically: an interruption at any time leaves the old or the new file.

    Args:
        path: file to write.
        data: its new content.
        backup: new path of the old file; None: the old file is discarded.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            path.replace(backup)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a partial file would only take up disk space
        raise


def write_atomically(path: Path, data: bytes, backup: Path | None = None) -> None:
    """Replace a file atomically, with an error message for the user.

    Args:
        path: file to write.
        data: its new content.
        backup: new path of the old file; None: the old file is discarded.

    Raises:
        UserError: the file cannot be written; the old file is unchanged.
    """
    try:
        replace_file(path, data, backup)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another --out or free disk space"
        ) from None


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as an additional last entry.

    >>> with_checksum({"lr": 0.1})
    {'lr': 0.1, 'crc32': 'bf1de9e9'}
    """
    content = {k: v for k, v in value.items() if k != CHECKSUM}
    text = json.dumps(content, allow_nan=False)
    return content | {CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}


def without_checksum(value: object) -> dict[str, Any]:
    """A parsed JSON object without its checksum.

    Raises:
        ValueError: it is no object, or the checksum is missing or wrong.
    """
    if not isinstance(value, dict) or CHECKSUM not in value:
        raise ValueError("no checksum")
    if with_checksum(value) != value:
        raise ValueError("wrong checksum")
    return {k: v for k, v in value.items() if k != CHECKSUM}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, json.dumps(with_checksum(value), indent=1, allow_nan=False).encode())


def read_json(path: Path, remedy: str = "delete it and run the same command again") -> dict[str, Any]:
    """Read a JSON object that was written by `write_json`.

    Args:
        path: file to read.
        remedy: what the user can do if the file is damaged.

    Raises:
        DamagedFile: the file cannot be read, or its checksum is wrong.
    """
    try:
        return without_checksum(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise DamagedFile(path, error, remedy) from None


class DamagedFile(UserError):
    """A file that cannot be read, or that has changed since it was written."""

    def __init__(self, path: Path, error: Exception, remedy: str) -> None:
        state = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"is damaged ({error})"
        super().__init__(f"{path} {state}: {remedy}")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a results directory while files are written to it; directories that stay empty are removed.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    path = directory / LOCK
    lock = FileLock(path)
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process writes to {directory}: wait until it ends, or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another --out") from None
    try:
        yield
    finally:
        # Before the release: afterwards, another process could own the file.
        with suppress(OSError):
            path.unlink()
        lock.release()
        with suppress(OSError):
            for place in missing:
                place.rmdir()
