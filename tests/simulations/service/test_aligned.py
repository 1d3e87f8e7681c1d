"""A service whose rule has an alignment, a matched head and a fallback."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from fedbn.data.shift import rotate
from fedbn.errors import UserError
from fedbn.models import build
from fedbn.online import BNState, SQLiteStore, fit_alignment, fit_matched_head, personalize
from fedbn.online.fallback import FallbackModel
from fedbn_simulations.service.access import Access
from fedbn_simulations.service.api import create_app
from fedbn_simulations.service.batching import Job
from fedbn_simulations.service.users import UserStore

GRAVITY = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
"""Directions of gravity of the classes. Their angles differ, so that only one rotation fits."""
SHAPE, CLASSES, TRIPLES = (6, 16), ("sit", "walk", "lie"), ((0, 1, 2), (3, 4, 5))
TURN = rotate(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(math.radians(40.0)))


def recording(n, seed):
    """Windows of three classes with different directions of gravity, and their labels."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.1 * torch.randn(n, *SHAPE, generator=draw)
    x[:, :3] += GRAVITY[y][:, :, None] + 0.05 * torch.randn(n, 3, 1, generator=draw)
    return x, y


@pytest.fixture(scope="module")
def parts():
    """Model, alignment and head of three seen users."""
    model = build("har-cnn", SHAPE, len(CLASSES), seed=0)
    seen = [recording(30, seed) for seed in range(3)]
    for x, _ in seen:
        model(x)
    model.eval()
    aligner = fit_alignment("rotation:every=1:b=0.25", seen, 3, TRIPLES)
    return {"model": model, "align": aligner, "head": fit_matched_head(model, seen, 3)}


def make_users(parts, **options):
    return UserStore(
        parts["model"], SHAPE, CLASSES, **{"rule": "rotation:every=1:b=0.25+pseudo+matched/fallback"} | options,
        align=parts["align"], head=parts["head"],
    )  # fmt: skip


def observe(users, user, x):
    users.enroll(user)
    [answer] = users.answer([Job(user, x, True)])
    return answer


def test_answers_equal_those_of_the_library_and_have_the_rotation(parts):
    users, x = make_users(parts), TURN(recording(24, 9)[0])
    net = personalize(parts["model"], "pseudo", align=parts["align"], head=parts["head"])
    reference = FallbackModel(net, parts["model"])
    for i in range(0, 24, 3):
        answer = observe(users, "ann", x[i : i + 3])
        out = reference.predict(x[i : i + 3], user=["ann"] * 3)
        reference.commit(posterior=out.softmax(1))
        torch.testing.assert_close(torch.from_numpy(answer.predictions), out.softmax(1))
    found = answer.alignment
    assert found["degrees"] == pytest.approx(40, abs=5)
    assert found["axis"][2] == pytest.approx(-1, abs=0.05), "the estimate turns the windows back"
    assert found["certainty"] > 0.9
    assert found["used"]
    assert found["learned"] == 24
    users.net.bank.rows["align_evidence"][users.net.bank.slot["ann"]] = -1000.0
    answer = observe(users, "ann", x[:1])
    torch.testing.assert_close(torch.from_numpy(answer.predictions), parts["model"](x[:1]).softmax(1).detach())
    assert not answer.alignment["used"]


def test_alignment_survives_restart_and_moves_with_snapshots(parts, tmp_path):
    x = TURN(recording(15, 8)[0])
    users = make_users(parts, store=SQLiteStore(tmp_path / "users.db"))
    observe(users, "ann", x)
    before = users.net.state("ann").alignment
    snapshot = users.snapshot("ann")
    users.journal.commit()
    users.store.close()
    again = make_users(parts, store=SQLiteStore(tmp_path / "users.db"))
    after = again.net.state("ann").alignment
    assert all(torch.equal(before[name], after[name]) for name in before)
    again.enroll("bob")
    again.restore("bob", snapshot, merge=True)
    again.restore("bob", snapshot, merge=True)
    assert again.report("bob")["alignment"]["learned"] == 30
    again.change(lambda: again.forget("ann"))
    again.journal.commit()
    assert "ann" not in again.store
    again.enroll("ann")
    assert again.report("ann")["alignment"]["degrees"] == 0
    again.store.close()
    with pytest.raises(UserError, match="rotation"):
        make_users(parts, rule="pseudo", store=SQLiteStore(tmp_path / "users.db"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", torch.tensor([2.0, 0.0, 0.0, 0.0])),
        ("value", torch.tensor([math.nan, 0.0, 0.0, 0.0])),
        ("n", torch.zeros(15)),
        ("mean", torch.full((15, 5), 1e12)),
        ("count", torch.tensor([-1.0, 0.0])),
        ("evidence", torch.tensor(math.inf)),
        ("evidence", torch.zeros(3)),
        ("evidence", None),
    ],
)
def test_snapshots_with_an_impossible_alignment_are_refused(parts, name, value):
    users = make_users(parts)
    observe(users, "ann", recording(15, 8)[0])
    state = users.net.state("ann")
    alignment = {**state.alignment, name: value}
    if value is None:
        del alignment[name]
    bad = BNState(**{**vars(state), "alignment": alignment}).to_bytes()
    before = users.snapshot("ann")
    with pytest.raises(UserError, match="its alignment has"):
        users.restore("ann", bad, merge=False)
    assert users.snapshot("ann") == before


def test_routes_return_rule_reason_and_rotation(parts):
    app = create_app(make_users(parts, reason="because"), Access())
    with TestClient(app, base_url="http://localhost") as client:
        about = client.get("/v1/model").json()
        assert (about["rule"], about["reason"]) == ("rotation:every=1:b=0.25+pseudo+matched/fallback", "because")
        client.put("/v1/users/ann")
        x = TURN(recording(15, 8)[0])
        found = client.post("/v1/users/ann/observe", content=json.dumps({"windows": x.tolist()})).json()["alignment"]
        schema = client.get("/openapi.json").json()["components"]["schemas"]["Answers"]["properties"]["alignment"]
        assert found.keys() == schema["properties"].keys()
        assert 25 < found["degrees"] < 55
        assert client.get("/v1/users/ann/export").status_code == 409


def test_rules_need_their_sums(parts):
    for rule, what in (("rotation", "alignment"), ("matched", "head")):
        with pytest.raises(UserError, match=f"its {what} needs sums"):
            UserStore(parts["model"], SHAPE, CLASSES, rule)
