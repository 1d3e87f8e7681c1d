"""Stores for the states of users that are not in memory: any mutable mapping from name to bytes, such as ``dict``.

Writes are atomic: after a crash, a store has either the old or the new state.
"""

from __future__ import annotations

import sqlite3
import string
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock, Timeout

from fedbn.errors import UserError
from fedbn.files import replace_file

Store = MutableMapping[str, bytes]
"""Maps the name of a user to its record (`fedbn.online.records`)."""

SUFFIX = ".bnstate"

PIECE = 200
"""Largest length of the name of a file or folder of `DirectoryStore`, without suffix. File systems allow 255."""

UNQUOTED = frozenset((string.ascii_lowercase + string.digits + "-_").encode())
"""Bytes that `DirectoryStore` does not quote. Capitals are quoted because some file systems ignore case."""

WAIT = 1.0
"""Seconds that `SQLiteStore` waits while another program locks its file."""

CHECKPOINT = 4000
"""Pages in the write-ahead log of `SQLiteStore` before they are moved to the file; 16 MB."""


class StoreError(UserError):
    """A store cannot be read or written at present.

    Args:
        text: names the cause and the fix.
        full: whether the disk is full.
    """

    def __init__(self, text: str, *, full: bool = False) -> None:
        super().__init__(text)
        self.full = full


class DirectoryStore(Store):
    """One file per user. Any name is valid, including ``../x``; a long one is split into folders.

    >>> from tempfile import mkdtemp
    >>> store = DirectoryStore(mkdtemp()); store["a/b"] = b"state"
    >>> list(store), store["a/b"]
    (['a/b'], b'state')
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, user: str) -> bytes:
        try:
            return self._file(user).read_bytes()
        except FileNotFoundError:
            raise KeyError(user) from None

    def __setitem__(self, user: str, state: bytes) -> None:
        replace_file(self._file(user), state)

    def __delitem__(self, user: str) -> None:
        try:
            self._file(user).unlink()
        except FileNotFoundError:
            raise KeyError(user) from None

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and self._file(user).exists()

    def __iter__(self) -> Iterator[str]:
        files = (f.relative_to(self.folder) for f in self.folder.rglob(f"*{SUFFIX}"))
        return iter(sorted(unquote("".join(f.parts).removesuffix(SUFFIX)) for f in files))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, user: str) -> Path:
        quoted = "".join(chr(byte) if byte in UNQUOTED else f"%{byte:02X}" for byte in user.encode())
        pieces = [quoted[i : i + PIECE] for i in range(0, max(1, len(quoted)), PIECE)]
        return self.folder.joinpath(*pieces[:-1], f"{pieces[-1]}{SUFFIX}")


class SQLiteStore(Store):
    """One table in one SQLite file, with one transaction per write.

    A write returns after the data is on disk (write-ahead log, ``synchronous=FULL``). The file has one owner: opening
    it a second time is refused until the first store is closed or its process has ended, because two banks would
    overwrite each other's states. Other programs can read the file or back it up at any time. Threads can share a
    store; reading does not wait for writing.

    Args:
        file: path of the file; it is created if needed.

    Raises:
        StoreError: the file has an owner, is damaged, or cannot be opened.

    >>> from tempfile import mkdtemp
    >>> store = SQLiteStore(Path(mkdtemp()) / "users.db"); store["ann"] = b"state"
    >>> "ann" in store, "bob" in store
    (True, False)
    >>> store.close()
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._locks = {name: threading.Lock() for name in ("reader", "writer")}
        if not self.file.parent.is_dir():
            raise StoreError(f"the folder of store {self.file} does not exist: create it, or use another")
        self._owner = FileLock(f"{self.file}.lock", thread_local=False)
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"store {self.file} is in use by another process: stop it, or use another") from None
        except OSError as error:
            raise StoreError(f"store {self.file} cannot be used ({error.strerror}): use another folder") from None
        with self._errors():
            self._connections = {name: self._connect() for name in self._locks}
            table = "CREATE TABLE IF NOT EXISTS states (user TEXT PRIMARY KEY, state BLOB NOT NULL)"
            self._connections["writer"].execute(table)

    def __getitem__(self, user: str) -> bytes:
        rows = self._read("SELECT state FROM states WHERE user = ?", user)
        if not rows:
            raise KeyError(user)
        return bytes(rows[0][0])

    def __setitem__(self, user: str, state: bytes) -> None:
        self.apply({user: state})

    def __delitem__(self, user: str) -> None:
        if not self.apply({user: None}):
            raise KeyError(user)

    def __contains__(self, user: object) -> bool:
        return bool(self._read("SELECT 1 FROM states WHERE user = ?", user))

    def __iter__(self) -> Iterator[str]:
        return (row[0] for row in self._read("SELECT user FROM states ORDER BY user"))

    def __len__(self) -> int:
        return int(self._read("SELECT count(*) FROM states")[0][0])

    def page(self, after: str, limit: int) -> list[str]:
        """Up to ``limit`` names in alphabetical order, starting after ``after``."""
        return [
            row[0] for row in self._read("SELECT user FROM states WHERE user > ? ORDER BY user LIMIT ?", after, limit)
        ]

    def apply(self, changes: Mapping[str, bytes | None]) -> int:
        """Write several states, and delete those that are None, in one transaction.

        Deleted states are overwritten in the file, and the write-ahead log is emptied.

        Returns:
            Number of states that were deleted.

        Raises:
            StoreError: the file cannot be written. Nothing was changed.

        >>> from tempfile import mkdtemp
        >>> store = SQLiteStore(Path(mkdtemp()) / "users.db")
        >>> store.apply({"ann": b"1", "bob": b"2"}), store.apply({"ann": b"3", "bob": None}), dict(store)
        (0, 1, {'ann': b'3'})
        """
        write = "INSERT INTO states VALUES (?, ?) ON CONFLICT (user) DO UPDATE SET state = excluded.state"
        with self._errors(), self._locks["writer"]:
            connection = self._connections["writer"]
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(write, ((user, state) for user, state in changes.items() if state is not None))
                gone = [(user,) for user, state in changes.items() if state is None]
                deleted = connection.executemany("DELETE FROM states WHERE user = ?", gone).rowcount
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            if deleted > 0:
                with suppress(sqlite3.OperationalError):  # the transaction is complete
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return max(0, deleted)

    def update(self, states: Any = (), /, **more: bytes) -> None:  # type: ignore[override]
        """Write several states in one transaction."""
        self.apply(dict(states, **more))

    def clear(self) -> None:
        """Delete all states in one transaction."""
        self.apply(dict.fromkeys(self))

    def close(self) -> None:
        """Close the file, so that it can be opened again."""
        for connection in self._connections.values():
            connection.close()
        self._owner.release()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None, check_same_thread=False)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "fullfsync = ON",  # macOS
            "secure_delete = ON",
            f"wal_autocheckpoint = {CHECKPOINT}",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _read(self, statement: str, *values: object) -> list[Any]:
        with self._errors(), self._locks["reader"]:
            return self._connections["reader"].execute(statement, values).fetchall()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").split("_")[0]
            advice = {
                "FULL": "free space on its disk",
                "BUSY": "another program has locked it; end that program",
                "CANTOPEN": "check that its folder exists and can be written",
                "READONLY": "check that it and its folder can be written",
                "IOERR": "check its disk",
            }.get(code, "restore a backup, or use another")
            damaged = "is damaged or not an SQLite database" if code in ("CORRUPT", "NOTADB") else "cannot be used"
            raise StoreError(f"store {self.file} {damaged} ({error}): {advice}", full=code == "FULL") from None
