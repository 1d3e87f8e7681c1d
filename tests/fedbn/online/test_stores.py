from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import unicodedata
from unittest.mock import Mock

import pytest
import torch

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.online import DirectoryStore, SQLiteStore, personalize
from fedbn.online.stores import StoreError
from tests.helpers import PYTHONPATH


def network(seed=0):
    torch.manual_seed(seed)
    return HarCNN((3, 16), 4).eval()


def data(n, seed=0):
    return torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.fixture(params=["dict", "directory", "sqlite"])
def store(request, tmp_path):
    if request.param == "dict":
        return {}
    return (DirectoryStore if request.param == "directory" else SQLiteStore)(tmp_path / "users")


NAMES = ["ann", "../ann", "a/b\\c", "ünï ©", "..", "x.bnstate", "50%", "", "A'; DROP TABLE states; --"]


def test_store_is_mapping_with_any_name(store):
    states = {name: bytes([i]) * (i + 1) for i, name in enumerate(NAMES)}
    store.update(states)
    assert dict(store) == states
    assert len(store) == len(NAMES)
    store["ann"] = b"new"
    assert [store["ann"], store.pop("ann")] == [b"new"] * 2
    assert "ann" not in store
    for call in (lambda: store["ann"], lambda: store.__delitem__("ann")):
        with pytest.raises(KeyError):
            call()


def test_users_are_reloaded_from_store(store):
    model = network()
    net = personalize(model, "pseudo", capacity=2, store=store)
    for i, row in enumerate(data(9)):
        net(row[None], user=i % 3)
    net.flush()
    reopened = personalize(model, "pseudo", capacity=2, store=store)
    assert reopened.users == ["0", "1", "2"]
    x = data(2, seed=7)
    for user in range(3):
        assert torch.equal(reopened.predict(x, user=user), net.predict(x, user=user))
    reopened.forget(1)
    assert list(store) == ["0", "2"]
    with pytest.raises(UserError, match="belongs to model"):
        personalize(network(seed=1), "pseudo", store=store).predict(x, user=0)


def test_store_keeps_old_state_after_crash(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path)
    store["ann"] = b"old"
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store["ann"] = b"new"
    (tmp_path / "tmpx1").write_bytes(b"left by a crash")
    assert store["ann"] == b"old"
    assert list(store) == ["ann"]


def test_store_removes_file_after_failed_write(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store["ann"] = b"x"
    assert not list(tmp_path.iterdir())


def test_store_rejects_damaged_file(tmp_path):
    path = tmp_path / "users.db"
    path.write_bytes(b"not a database, but as long as the header of one" * 20)
    with pytest.raises(UserError, match=r"store .*users.db is damaged or not an SQLite database"):
        SQLiteStore(path)


# ---------------------------------------------------------------- names


LONG = "長い名前" * 32
"""128 characters, 1152 in a quoted path."""


def test_store_takes_every_valid_name(store):
    names = [LONG, "x" * 128, "Ann", "ann", "ANN", "💡" * 128, "%41nn", "-", "con", "a" * 200 + ".bnstate", "a" * 200]
    store.update({name: name.encode() for name in names})
    assert {name: store[name] for name in names} == {name: name.encode() for name in names}
    assert sorted(store) == sorted(names)
    if isinstance(store, DirectoryStore):
        files = [str(path.relative_to(store.folder)).lower() for path in store.folder.rglob("*.bnstate")]
        assert len(set(files)) == len(names), "names of files differ, even if the file system ignores case"
    del store[names[0]]
    store.clear()
    assert not list(store)


def test_names_have_one_canonical_form():
    net = personalize(network(), "pseudo")
    decomposed = unicodedata.normalize("NFD", "josé")
    net(data(2), user=["josé", decomposed])
    net.load(decomposed, net.state("josé"))
    assert net.users == ["josé"]
    assert net.state(decomposed).n == 2
    net.forget(decomposed)
    assert net.users == []


@pytest.mark.parametrize("name", ["", "a\nb", "\x00", "\udcff", "x" * 129])
def test_names_that_are_not_valid_are_rejected(name):
    net = personalize(network(), "pseudo")
    predict = [lambda user: net.predict(data(1), user), lambda user: net(data(1), [user])]
    for call in (net.state, net.reset, net.forget, *predict):
        with pytest.raises(UserError, match="is not a user's name: use 1 to 128 printable characters"):
            call(name)
    assert net.users == []


# ---------------------------------------------------------------- SQLite: owner, locks, full disk


def test_second_store_is_refused_until_the_first_is_closed(tmp_path):
    path = tmp_path / "users.db"
    first = SQLiteStore(path)
    with pytest.raises(StoreError, match="is in use by another process: stop it, or use another"):
        SQLiteStore(path)
    first["ann"] = b"1"
    first.close()
    assert dict(SQLiteStore(path)) == {"ann": b"1"}


@pytest.mark.slow
def test_owner_disappears_with_its_process_and_acknowledged_writes_survive(tmp_path):
    path = tmp_path / "users.db"
    code = (
        "import sys; from fedbn.online.stores import SQLiteStore; store = SQLiteStore(sys.argv[1])\n"
        "for i in range(10**9):\n    store.update({f'u{i % 50}': b'%d' % i}); print(i, flush=True)"
    )
    options = {"stdout": subprocess.PIPE, "text": True, "env": {"PYTHONPATH": PYTHONPATH, "PATH": os.environ["PATH"]}}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], **options)
    try:
        lines = [process.stdout.readline() for _ in range(120)]
        with pytest.raises(StoreError, match="is in use by another process"):
            SQLiteStore(path)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.wait()
    finally:
        process.kill()
        process.stdout.close()
    last = int(lines[-1])
    stored = {user: int(state) for user, state in SQLiteStore(path).items()}
    for i in range(last - 49, last + 1):
        assert stored[f"u{i % 50}"] >= i
    assert max(stored.values()) <= last + 1


def test_locked_store_can_be_read_but_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("fedbn.online.stores.WAIT", 0.05)
    store = SQLiteStore(tmp_path / "users.db")
    store["ann"] = b"old"
    other = sqlite3.connect(store.file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another program has locked it") as error:
        store["ann"] = b"new"
    assert not error.value.full
    assert store["ann"] == b"old"
    other.execute("ROLLBACK")
    store["ann"] = b"new"
    assert store["ann"] == b"new"
    with sqlite3.connect(tmp_path / "copy.db") as copy:  # a backup while the store is open
        other.backup(copy)
        assert copy.execute("SELECT * FROM states").fetchall() == [("ann", b"new")]


def test_deleted_state_is_not_left_on_disk(tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    for i in range(30):
        store[f"u{i}"] = b"MARK%04d" % i * 300
    del store["u7"]
    found = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"MARK0008" in found
    assert b"MARK0007" not in found


def test_writes_wait_for_the_disk(tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    for connection in store._connections.values():
        values = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert values == ["wal", 2]  # 2: FULL


def test_reading_does_not_wait_for_writing(tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    store["ann"] = b"1"
    started, finish = threading.Event(), threading.Event()

    def changes():
        yield "bob", b"2"
        started.set()
        assert finish.wait(10)
        yield "cem", b"3"

    thread = threading.Thread(target=lambda: store.apply(Mock(items=lambda: changes())))
    thread.start()
    assert started.wait(10)
    assert (list(store), store["ann"]) == (["ann"], b"1")
    finish.set()
    thread.join(10)
    assert list(store) == ["ann", "bob", "cem"]


def test_full_disk_raises_an_error_and_changes_nothing(tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    store["ann"] = b"1"
    [(pages,)] = store._connections["writer"].execute("PRAGMA page_count").fetchall()
    store._connections["writer"].execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match="free space on its disk") as error:
        store.update({"bob": b"2", "cem": b"x" * 100_000})
    assert error.value.full
    assert dict(store) == {"ann": b"1"}
    store["ann"] = b"2"


def test_store_names_a_missing_folder(tmp_path):
    with pytest.raises(StoreError, match=r"the folder of store .*users.db does not exist: create it, or use another"):
        SQLiteStore(tmp_path / "none" / "users.db")
