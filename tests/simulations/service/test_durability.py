from __future__ import annotations

import asyncio
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from benchmarks.faults import service_kills
from fedbn.models import build
from fedbn.online import SQLiteStore
from fedbn.online.stores import StoreError
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.durability import GroupCommit, Journal
from fedbn_simulations.service.schema import BINARY
from fedbn_simulations.service.users import Limits, UserStore
from tests.helpers import wait_until

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr("fedbn.online.stores.WAIT", 0.05)
    monkeypatch.setattr("fedbn_simulations.service.api.RELAXED_SECONDS", 0.1)
    store = SQLiteStore(tmp_path / "users.db")
    yield store
    store.close()


@pytest.fixture
def serve(store):
    opened = []
    model = build("har-cnn", SHAPE, len(CLASSES), seed=0).eval()

    def make(*enrolled, durability="full", capacity=4):
        users = UserStore(model, SHAPE, CLASSES, "pseudo:n0=4", store=store, limits=Limits(capacity=capacity))
        app = create_app(users, Access(), durability=durability)
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        opened.append(client.__enter__())
        client.users = users
        client.stop = lambda: opened.remove(client) or client.__exit__(None, None, None)
        for user in enrolled:
            client.put(f"/v1/users/{user}")
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def observe(client, user, seed=0, route="observe"):
    window = np.random.default_rng(seed).standard_normal((1, *SHAPE)).astype("<f4").tobytes()
    return client.post(f"/v1/users/{user}/{route}", content=window, headers={"content-type": BINARY})


def failing(store, monkeypatch, error, before=lambda: None):
    def apply(changes):
        before()
        raise error

    monkeypatch.setattr(store, "apply", apply)


# ---------------------------------------------------------------- journal and group commit


def test_journal_shows_changes_before_they_are_written(store):
    journal = Journal(store)
    journal["ann"], journal["bob"] = b"1", b"2"
    assert (dict(journal), dict(store), journal.pending) == ({"ann": b"1", "bob": b"2"}, {}, True)
    journal.commit()
    assert (dict(store), journal.pending) == ({"ann": b"1", "bob": b"2"}, False)
    del journal["ann"]
    journal["cem"] = b"3"
    assert "ann" not in journal
    assert journal.get("ann") is None
    assert list(journal) == ["bob", "cem"]
    assert [journal.page("", 1), journal.page("b", 5), journal.page("bob", 5)] == [["bob"], ["bob", "cem"], ["cem"]]
    with pytest.raises(KeyError):
        del journal["ann"]
    journal.commit()
    assert dict(store) == {"bob": b"2", "cem": b"3"}


def test_failed_transaction_keeps_changes_in_order(store, monkeypatch):
    journal = Journal(store)
    journal["ann"] = journal["bob"] = journal["cem"] = b"1"
    failing(store, monkeypatch, StoreError("full", full=True), lambda: journal.update(cem=b"2"))
    with pytest.raises(StoreError):
        journal.commit()
    with pytest.raises(StoreError):
        journal.require_writable()
    journal["ann"] = b"2"
    del journal["bob"]
    monkeypatch.undo()
    journal.commit()
    journal.require_writable()
    assert dict(store) == {"ann": b"2", "cem": b"2"}


def test_changes_during_a_transaction_belong_to_the_next(store, monkeypatch):
    journal, applied = Journal(store), []

    def apply(changes):
        journal["ann"] = b"2"
        applied.append(dict(changes))

    monkeypatch.setattr(store, "apply", apply)
    journal["ann"] = b"1"
    journal.commit()
    assert (applied, journal["ann"], journal.pending) == ([{"ann": b"1"}], b"2", True)


def test_one_transaction_saves_all_callers_that_wait():
    calls, release = [], threading.Event()

    def commit():
        calls.append(len(calls))
        assert release.wait(5)

    async def run():
        saving = GroupCommit(commit)
        tasks = [asyncio.create_task(saving.saved())]
        await asyncio.sleep(0.05)  # the first transaction has started
        tasks += [asyncio.create_task(saving.saved()) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks), "acknowledged before it was saved"
        release.set()
        await asyncio.gather(*tasks)
        await saving.close()

    asyncio.run(run())
    assert len(calls) == 2


# ---------------------------------------------------------------- acknowledgments


def test_acknowledged_changes_are_in_the_store(serve, store):
    client = serve("ann", "bob")
    assert list(store) == ["ann", "bob"]
    for change in (
        lambda: observe(client, "ann"),
        lambda: client.post("/v1/users/ann/commit", json={"windows": [[[0.5] * 16] * 6], "labels": [1]}),
        lambda: client.post("/v1/users/ann/merge", content=client.get("/v1/users/ann/snapshot").content),
        lambda: client.post("/v1/users/ann/calibrate", json={"windows": [[[0.5] * 16] * 6]}),
        lambda: client.post("/v1/users/ann/reset"),
    ):
        before = store["ann"]
        assert change().is_success
        assert store["ann"] != before
        bank = client.users.net.bank
        assert [store["ann"]] == bank.records.pack(bank.rows, torch.tensor([bank.slot["ann"]]))
    assert client.delete("/v1/users/ann").status_code == 204
    assert list(store) == ["bob"]


def test_deleted_user_stays_deleted(serve, store):
    client = serve("ann", "bob", "cem", "dan", "eve", capacity=2)
    observe(client, "ann")
    assert client.delete("/v1/users/ann").status_code == 204
    for user in ("bob", "cem", "dan", "eve", "bob"):  # evicts users
        observe(client, user)
    assert observe(client, "ann").status_code == 404
    client.stop()
    assert list(store) == ["bob", "cem", "dan", "eve"]


def test_relaxed_answers_before_the_disk_and_saves_by_itself(serve, store, monkeypatch):
    client = serve("ann", durability="relaxed")
    started, release = threading.Event(), threading.Event()
    apply = store.apply

    def slow(changes):
        started.set()
        assert release.wait(10)
        return apply(changes)

    monkeypatch.setattr(store, "apply", slow)
    before = store["ann"]
    assert observe(client, "ann").status_code == 200
    assert started.wait(3)
    assert store["ann"] == before
    release.set()
    assert wait_until(lambda: store["ann"] != before)
    assert client.delete("/v1/users/ann").status_code == 204
    assert "ann" not in store, "other changes are on disk when they are acknowledged"


# ---------------------------------------------------------------- full disk, locked store


def test_full_disk_is_reported_and_nothing_is_lost(serve, store, monkeypatch):
    client = serve("ann", "bob")
    failing(store, monkeypatch, StoreError("store /secret/users.db cannot be used", full=True))
    refused = observe(client, "ann")
    assert refused.status_code == 507
    assert "the disk of the service is full" in refused.json()["error"]
    assert "secret" not in refused.text
    before = client.get("/v1/users/bob/snapshot").content
    for method, path in (("PUT", "cem"), ("POST", "bob/observe"), ("POST", "bob/reset"), ("DELETE", "bob")):
        assert client.request(method, f"/v1/users/{path}").status_code == 507
    assert client.get("/v1/users/bob/snapshot").content == before, "refused before anything changes"
    assert client.get("/health").status_code == 507
    assert "fedbn_store_failed 1.0" in client.get("/metrics").text
    assert observe(client, "bob", route="predict").status_code == 200, "predictions need no disk"
    monkeypatch.undo()
    assert wait_until(lambda: client.get("/health").json() == {"status": "ok"})
    learned = client.get("/v1/users/ann").json()["learned"]
    client.stop()
    assert serve().get("/v1/users/ann").json()["learned"] == learned == 1


def test_locked_store_does_not_block_the_bank(serve, store):
    client = serve("ann", "bob")
    with sqlite3.connect(store.file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        late = []
        thread = threading.Thread(target=lambda: late.append(observe(client, "ann")))
        thread.start()
        time.sleep(0.02)
        start = time.monotonic()
        assert observe(client, "bob", route="predict").status_code == 200
        assert time.monotonic() - start < 0.5
        thread.join(10)
        assert late[0].status_code == 503
        assert late[0].headers["retry-after"] == "1"
        assert client.get("/health").status_code == 503
        other.execute("ROLLBACK")
    other.close()
    assert wait_until(lambda: client.get("/health").status_code == 200)
    assert observe(client, "ann").status_code == 200


def test_store_that_hangs_is_reported(serve, store, monkeypatch):
    monkeypatch.setattr("fedbn_simulations.service.durability.STALLED_SECONDS", 0.05)
    client, release = serve("ann"), threading.Event()
    apply = store.apply
    monkeypatch.setattr(store, "apply", lambda changes: release.wait(10) and apply(changes))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(observe(client, "ann")))
    thread.start()
    assert wait_until(lambda: client.get("/health").status_code == 503, 5)
    assert observe(client, "ann").status_code == 503
    release.set()
    thread.join(10)
    assert [answer.status_code for answer in answers] == [200]
    assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_killed_service_loses_no_acknowledged_write(tmp_path):
    result = service_kills(6, tmp_path)
    assert result["tries"] == 6
    assert result["lost or wrong"] == 0
    assert result["acknowledged"] > 100
