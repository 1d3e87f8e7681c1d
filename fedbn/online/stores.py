"""Stores for the states of users that are not in memory: any mutable mapping from name to bytes, such as ``dict``.

Writes are atomic: after a crash, a store has either the old or the new state.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fedbn.errors import UserError

Store = MutableMapping[str, bytes]
"""Maps the name of a user to `fedbn.online.state.BNState.to_bytes`."""

SUFFIX = ".bnstate"


class DirectoryStore(Store):
    """One file per user. Any name is valid, including ``../x``.

    >>> store = DirectoryStore(tempfile.mkdtemp()); store["a/b"] = b"state"
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
        handle, name = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(state)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._file(user))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def __delitem__(self, user: str) -> None:
        try:
            self._file(user).unlink()
        except FileNotFoundError:
            raise KeyError(user) from None

    def __iter__(self) -> Iterator[str]:
        return (unquote(f.name.removesuffix(SUFFIX)) for f in sorted(self.folder.glob(f"*{SUFFIX}")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, user: str) -> Path:
        return self.folder / f"{quote(user, safe='')}{SUFFIX}"


class SQLiteStore(Store):
    """One table in one file, with one transaction per write.

    >>> store = SQLiteStore(Path(tempfile.mkdtemp()) / "users.db"); store["ann"] = b"state"
    >>> "ann" in store, "bob" in store
    (True, False)
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._write("CREATE TABLE IF NOT EXISTS states (user TEXT PRIMARY KEY, state BLOB NOT NULL)")

    def __getitem__(self, user: str) -> bytes:
        rows = self._read("SELECT state FROM states WHERE user = ?", user)
        if not rows:
            raise KeyError(user)
        return bytes(rows[0][0])

    def __setitem__(self, user: str, state: bytes) -> None:
        self._write("INSERT OR REPLACE INTO states VALUES (?, ?)", user, state)

    def write_all(self, states: Mapping[str, bytes]) -> None:
        """Write several states in one transaction, which is atomic and waits for the disk once.

        >>> store = SQLiteStore(Path(tempfile.mkdtemp()) / "users.db"); store.write_all({"ann": b"1", "bob": b"2"})
        >>> dict(store)
        {'ann': b'1', 'bob': b'2'}
        """
        with self._open() as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", states.items())

    def __delitem__(self, user: str) -> None:
        if not self._write("DELETE FROM states WHERE user = ?", user):
            raise KeyError(user)

    def __iter__(self) -> Iterator[str]:
        return (row[0] for row in self._read("SELECT user FROM states ORDER BY user"))

    def __len__(self) -> int:
        return int(self._read("SELECT count(*) FROM states")[0][0])

    def _read(self, statement: str, *values: object) -> list[Any]:
        with self._open() as connection:
            return connection.execute(statement, values).fetchall()

    def _write(self, statement: str, *values: object) -> int:
        with self._open() as connection, connection:
            return connection.execute(statement, values).rowcount

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.file)) as connection:
                yield connection
        except sqlite3.OperationalError:
            raise  # locked, disk full, missing folder: SQLite's message is clear
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"store {self.file} is damaged or not an SQLite database ({error}): restore a backup, or use another"
            ) from None
