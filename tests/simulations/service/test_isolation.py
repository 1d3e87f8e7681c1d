"""What one user sends, or what has happened to its stored state, never affects other users."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from fedbn.errors import UserError
from fedbn.models import build
from fedbn.online import SQLiteStore, personalize
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.batching import Job
from fedbn_simulations.service.held import HeldWindows
from fedbn_simulations.service.schema import BINARY, RequestError
from fedbn_simulations.service.users import Limits, UserStore

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")
RULE = "pseudo:n0=4"


@pytest.fixture(scope="module")
def model():
    return build("har-cnn", SHAPE, len(CLASSES), seed=0).eval()


@pytest.fixture
def store(tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    yield store
    store.close()


def make_users(model, *enrolled, rule=RULE, **options):
    users = UserStore(model, SHAPE, CLASSES, rule, **options)
    for name in enrolled:
        users.enroll(name)
    return users


def windows(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def jobs_of(*names, learn=True, **special):
    return [Job(name, special.get(name, windows(1, ord(name[0]))), learn) for name in names]


HOSTILE = {
    "huge": torch.full((1, *SHAPE), 3e38),
    "huge in one window of two": torch.cat([windows(1), torch.full((1, *SHAPE), -1e38)]),
    "beyond the limit of statistics": torch.full((1, *SHAPE), 1e16),
    "one huge value": windows(1).index_fill(2, torch.tensor([3]), 1e30),
}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_huge_windows_fail_only_their_own_request(model, name, learn):
    users, healthy = make_users(model, "ann", "bob", "eve"), make_users(model, "ann", "bob", "eve")
    before = users.snapshot("eve")
    answers = users.answer(jobs_of("ann", "eve", "bob", learn=learn, eve=HOSTILE[name]))
    expected = healthy.answer(jobs_of("ann", "bob", learn=learn))
    assert isinstance(answers[1], RequestError)
    assert (answers[1].status, "too large" in str(answers[1])) == (422, True)
    for answer, other in zip((answers[0], answers[2]), expected, strict=True):
        np.testing.assert_allclose(answer.predictions, other.predictions, atol=1e-6)
    assert users.snapshot("eve") == before
    if learn:
        assert users.report("ann")["learned"] == 1
    with pytest.raises(UserError, match="too large"):
        users.learn("eve", HOSTILE[name], [0] * len(HOSTILE[name]))
    with pytest.raises(UserError, match="too large"):
        users.calibrate("eve", HOSTILE[name], None, "adapt")
    assert users.snapshot("eve") == before


def test_model_that_raises_fails_only_the_request_that_causes_it(model):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = model, 0

        def forward(self, x):
            self.calls += 1
            if (x[:, 0, 0] == 7).any():
                raise ZeroDivisionError("a bug of the model")
            return self.net(x)

    names = [f"u{i}" for i in range(16)]
    users = UserStore(Strict().eval(), SHAPE, CLASSES, RULE)
    for name in names:
        users.enroll(name)
    calls = users.net.model.calls
    bad = torch.full((1, *SHAPE), 7.0)
    answers = users.answer(jobs_of(*names, u5=bad))
    assert [type(a).__name__ for a in answers] == ["Answer"] * 5 + ["ZeroDivisionError"] + ["Answer"] * 10
    assert users.net.model.calls - calls <= 10, "the batch is halved, not answered one by one"
    assert [users.report(name)["learned"] for name in names] == [1] * 5 + [0] + [1] * 10


def damage(store, user):
    record = bytearray(store[user])
    record[-20] ^= 4
    store[user] = bytes(record)
    return bytes(record)


def test_damaged_record_fails_only_its_user_until_it_is_replaced(model, store):
    users = make_users(model, "ann", "bob", "eve", store=store)
    users.answer(jobs_of("ann", "bob", "eve"))
    snapshot = users.snapshot("eve")
    users.journal.commit()
    damaged = damage(store, "eve")
    users = make_users(model, store=store)
    for _ in range(3):
        answers = users.answer(jobs_of("eve", "ann", "bob"))
        assert (answers[0].status, "damaged" in str(answers[0])) == (409, True)
        assert [answer.user for answer in answers[1:]] == ["ann", "bob"]
    assert (users.num_damaged, users.journal["eve"]) == (1, damaged), "it is kept as it is"
    assert not users.enroll("eve"), "enrolling does not replace it either"
    for call in (users.report, users.snapshot, users.export, lambda user: users.restore(user, snapshot, merge=True)):
        with pytest.raises(RequestError, match="restore a snapshot of 'eve', reset the user to start again, or delete"):
            call("eve")
    with pytest.raises(UserError, match="not a user's state"):
        users.restore("eve", b"nonsense", merge=False)
    assert users.journal["eve"] == damaged
    users.restore("eve", snapshot, merge=False)
    assert users.snapshot("eve") == snapshot
    users.flush()
    users.journal.commit()
    assert make_users(model, store=store).snapshot("eve") == snapshot
    assert users.num_damaged == 0


@pytest.mark.parametrize(("action", "exists"), [("reset", True), ("forget", False)])
def test_damaged_record_can_be_reset_or_deleted(model, store, action, exists):
    users = make_users(model, "ann", "eve", store=store)
    users.flush()
    users.journal.commit()
    damage(store, "eve")
    users = make_users(model, store=store)
    getattr(users, action)("eve")
    users.flush()
    users.journal.commit()
    again = make_users(model, store=store)
    assert again.users("", 9) == (["ann", "eve"] if exists else ["ann"])
    assert not exists or again.report("eve")["learned"] == 0


def test_store_that_cannot_be_read_at_all_is_refused(model, store):
    make_users(model, store=store)
    for user in ("ann", "bob"):
        store[user] = b"written by another version"
    with pytest.raises(UserError, match=r"no state in store .*users.db can be read .*: use another store"):
        make_users(model, store=store)


def test_names_in_pages_include_users_in_memory_only(model, store):
    users = make_users(model, *"fbda", store=store)
    users.flush()
    users.journal.commit()
    users.enroll("c")
    users.forget("b")
    assert users.users("", 3) == ["a", "c", "d"]
    assert users.users("c", 3) == ["d", "f"]


def test_held_windows_of_the_user_with_the_most_are_dropped_first():
    held = HeldWindows(4)
    first = held.add("ann", torch.zeros(1))
    names = [held.add("eve", torch.zeros(1)) for _ in range(50)]
    assert list(held.of("ann")) == [first]
    assert list(held.of("eve")) == names[-3:]
    with pytest.raises(RequestError, match="not \\(or no longer\\) held"):
        held.stack("ann", [names[-1]])
    held.remove("ann", [first])
    held.remove("eve")
    assert held._windows == {}
    assert held._size == 0


def test_labels_that_are_not_valid_leave_held_windows(model, monkeypatch):
    users = make_users(model, "ann")
    [answer] = users.answer([Job("ann", windows(2), False, True)])
    monkeypatch.setattr(users.net, "commit", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        users.commit("ann", dict.fromkeys(answer.held, 0))
    monkeypatch.undo()
    assert users.commit("ann", dict.fromkeys(answer.held, 0)) == 2


@pytest.mark.parametrize("key", ["mean", "base_var", "frozen", "scale", "n"])
def test_snapshot_cannot_address_other_rows(model, key):
    """A counter with the name of a table used to be written to that table."""
    users = make_users(model, "ann", "eve")
    users.answer(jobs_of("ann", "eve"))
    state = users.net.state("eve")
    rows = {name: t.clone() for name, t in users.net.bank.rows.items()}
    tally = {**state.tally, key: 5.0}
    for merge in (False, True):
        with pytest.raises(UserError):
            users.net.bank.check(state.__class__(**{**vars(state), "tally": tally}))
        text = state.to_bytes().replace(b'\\"tally\\":[', b'\\"tally\\":{')
        with pytest.raises(UserError, match="not a user's state"):
            users.restore("eve", text, merge=merge)
    assert all(torch.equal(t, users.net.bank.rows[name]) for name, t in rows.items())


def test_healthy_requests_succeed_while_others_attack(model, store):
    """All users at once over the application: 40 healthy ones, and hostile ones of every kind."""
    users = make_users(model, *(f"u{i}" for i in range(40)), "eve", "mia", store=store, limits=Limits(capacity=16))
    users.flush()
    users.journal.commit()
    damage(store, "mia")
    users = make_users(model, store=store, limits=Limits(capacity=16))
    app = create_app(users, Access(rate=0))
    reference = personalize(model, RULE)
    bodies = {"eve": HOSTILE["huge"].numpy().tobytes(), "mia": windows(1).numpy().tobytes()}
    order = [name for i in range(40) for name in (f"u{i}", "eve", "mia")]

    async def post(user, body):
        messages = []
        path = f"/v1/users/{user}/observe"
        headers = [(b"host", b"localhost"), (b"content-type", BINARY.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            messages.append(message)

        await app(scope | {"query_string": b""}, receive, send)
        return messages[0]["status"], json.loads(messages[1]["body"])

    async def attack():
        sent = [(user, bodies.get(user, windows(1, i).numpy().tobytes())) for i, user in enumerate(order)]
        return await asyncio.gather(*(post(user, body) for user, body in sent))

    with TestClient(app, base_url="http://localhost") as client:
        results = client.portal.call(attack)
    for i, (user, (status, body)) in enumerate(zip(order, results, strict=True)):
        assert status == {"eve": 422, "mia": 409}.get(user, 200), body
        if user not in bodies:
            out = reference(windows(1, i), user).softmax(1)[0]
            np.testing.assert_allclose(body["answers"][0]["probabilities"], out.numpy(), atol=1e-5)
