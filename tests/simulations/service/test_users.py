from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from safetensors.torch import load

pytest.importorskip("fastapi")

from fedbn.errors import UserError
from fedbn.models import build
from fedbn.online import SQLiteStore, personalize
from fedbn.online.drift.detectors import Adwin, PageHinkley
from fedbn.online.drift.signal import Context
from simulations.service import drift as watching
from simulations.service.access import Access, Rates
from simulations.service.batching import Batcher, Job
from simulations.service.drift import BatchedMonitor
from simulations.service.schema import Answer, Refusal, advice, checked_name, labels_of, windows_of
from simulations.service.users import Limits, UserStore

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")


@pytest.fixture(scope="module")
def model():
    net = build("har-cnn", SHAPE, len(CLASSES), seed=0)
    net(torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1)))
    return net.eval()


def people(model, **settings):
    return UserStore(model, SHAPE, CLASSES, **{"rule": "pseudo:n0=4", **settings})


def windows(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def observe(crowd, user, x, learn=True, hold=False):
    [answer] = crowd.answer([Job(user, x, learn, hold)])
    if isinstance(answer, Exception):
        raise answer
    return answer


# ---------------------------------------------------------------- people


def test_answers_are_those_of_the_bank_however_users_share_a_call(model):
    crowd, alone = people(model), personalize(model, "pseudo:n0=4")
    names = ["ann", "bob", "cem"]
    for name in names:
        assert crowd.enroll(name)
    for t in range(5):
        jobs = [Job(name, windows(1 + i, 10 * t + i), True) for i, name in enumerate(names)]
        answers = crowd.answer(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            out = alone.predict(job.windows, job.user)
            alone.commit(posterior=out.softmax(1))
            np.testing.assert_allclose(answer.probabilities, out.softmax(1).numpy(), atol=1e-5)
            assert answer.user == job.user


def test_predicting_learns_nothing_and_a_held_window_is_learnt_with_its_label_once(model):
    crowd, told = people(model), personalize(model, "pseudo:n0=4")
    crowd.enroll("ann")
    x = windows(2)
    before = crowd.snapshot("ann")
    answer = observe(crowd, "ann", x, learn=False, hold=True)
    assert crowd.snapshot("ann") == before
    assert crowd.commit("ann", dict(zip(answer.held, [1, 2], strict=True))) == 2
    told.predict(x, "ann")
    told.commit(label=torch.tensor([1, 2]))
    assert crowd.snapshot("ann") == told.state("ann").to_bytes()
    with pytest.raises(Refusal, match="not held"):
        crowd.commit("ann", {answer.held[0]: 1})


def test_held_windows_belong_to_their_user_and_the_oldest_give_way(model):
    crowd = people(model, limits=Limits(held=2))
    crowd.enroll("ann")
    crowd.enroll("bob")
    first, second, third = observe(crowd, "ann", windows(3), learn=False, hold=True).held
    with pytest.raises(Refusal, match="not held"):
        crowd.commit("ann", {second: 0, first: 0})
    with pytest.raises(Refusal, match="not held"):
        crowd.commit("bob", {second: 0})
    assert crowd.commit("ann", {second: 0, third: 1}) == 2


def test_state_survives_a_restart_and_more_users_than_memory_holds(model, tmp_path):
    store = tmp_path / "users.db"
    crowd = people(model, store=SQLiteStore(store), limits=Limits(capacity=2))
    for i, name in enumerate(("ann", "bob", "cem")):
        crowd.enroll(name)
        observe(crowd, name, windows(3, i))
    assert crowd.at_hand == 2
    while crowd.keep(1):
        pass
    before = {name: crowd.snapshot(name) for name in ("ann", "bob", "cem")}
    again = people(model, store=SQLiteStore(store))
    assert again.users("", 10) == ["ann", "bob", "cem"]
    assert again.users("ann", 1) == ["bob"]
    assert {name: again.snapshot(name) for name in before} == before
    with pytest.raises(UserError, match="kept by rule"):
        people(model, store=SQLiteStore(store), rule="ema")


def test_snapshots_merge_and_export_and_users_are_forgotten_wholly(model, tmp_path):
    crowd = people(model, store=SQLiteStore(tmp_path / "users.db"))
    crowd.enroll("ann")
    crowd.enroll("ann2")
    observe(crowd, "ann", windows(4, 1))
    observe(crowd, "ann2", windows(4, 2))
    merged = crowd.net.state("ann").merge(crowd.net.state("ann2"))
    crowd.restore("ann", crowd.snapshot("ann2"), merge=True)
    assert crowd.net.state("ann").n == merged.n == 8
    plain = build("har-cnn", SHAPE, len(CLASSES), seed=0)
    plain.load_state_dict(load(crowd.export("ann")))
    x = windows(3, 3)
    expected = observe(crowd, "ann", x, learn=False, hold=True)
    np.testing.assert_allclose(plain.eval()(x).softmax(1).detach().numpy(), expected.probabilities, atol=1e-5)
    crowd.keep()
    crowd.forget("ann")
    assert crowd.users("", 10) == ["ann2"]
    assert "ann" not in SQLiteStore(tmp_path / "users.db")
    assert not crowd._held
    for act in (crowd.snapshot, crowd.forget, crowd.report, crowd.reset, crowd.export):
        with pytest.raises(Refusal, match="enroll the user first"):
            act("ann")
    with pytest.raises(UserError, match="no state of a user"):
        crowd.restore("ann2", b"nonsense", merge=False)


def test_without_a_store_memory_is_the_limit(model):
    crowd = people(model, limits=Limits(capacity=1))
    crowd.enroll("ann")
    with pytest.raises(Refusal, match="fill the memory") as refused:
        crowd.enroll("bob")
    assert refused.value.status == 507
    crowd.forget("ann")
    assert crowd.enroll("bob")


def test_calibration_changes_the_advice(model):
    crowd = people(model)
    crowd.enroll("ann")
    answer = observe(crowd, "ann", windows(1))
    assert advice(answer, CLASSES)["action"] == "calibrate"
    crowd.calibrate("ann", windows(3), [0, 1, 2], "adapt")
    answer = observe(crowd, "ann", windows(1))
    assert answer.calibrated
    assert advice(answer, CLASSES)["action"] == "none"
    told = Answer("ann", answer.probabilities, 1.0, True, 1, answer.met, True)
    assert advice(told, CLASSES) == advice(told, CLASSES) | {"action": "recalibrate", "classes": list(CLASSES)}


@pytest.mark.parametrize("name", ["capacity", "held", "windows"])
def test_limits_serve_somebody(name):
    with pytest.raises(UserError, match=f"--{name} must be at least 1"):
        Limits(**{name: 0})


# ---------------------------------------------------------------- watching


def test_the_table_gives_the_distances_of_single_contexts_and_alarms_of_their_logarithm(monkeypatch):
    monkeypatch.setattr("fedbn.online.drift.signal.FLOOR", watching.FLOOR)
    draw = np.random.default_rng(0)
    kinds, scale = 3, np.array([1.0, 2.0, 0.5])
    watches = BatchedMonitor(PageHinkley(threshold=2.0), scale, kinds, capacity=3)
    contexts = {u: Context(torch.tensor(scale)) for u in "abc"}
    alarms = {u: PageHinkley(threshold=2.0).new() for u in "abc"}
    spoken = 0
    for t in range(150):
        looks = draw.normal(size=(3, 3)) + (6 if t > 100 else 0)
        labels = draw.integers(0, kinds, 3)
        seen = watches.see(list("abc"), looks, labels)
        for user, m, label, (z, spoke) in zip("abc", torch.tensor(looks), labels.tolist(), seen, strict=True):
            expected = contexts[user].distance(m, label)
            assert (z is None) == (expected is None)
            if expected is not None:
                assert z == pytest.approx(expected)
                single = {c: Context(torch.tensor(scale[[c]])) for c in range(3)}
                for c, one in single.items():
                    one.n, one.mean = contexts[user].n, {k: v[[c]] for k, v in contexts[user].mean.items()}
                    one.m2 = {k: v[[c]] for k, v in contexts[user].m2.items()}
                alarms[user].update(np.mean([np.log1p(one.distance(m[[c]], label)) for c, one in single.items()]))
                assert spoke == alarms[user].drift_detected
                if spoke:
                    spoken += 1
                    contexts[user], alarms[user] = Context(torch.tensor(scale)), PageHinkley(threshold=2.0).new()
            contexts[user].learn(m, label)
    assert spoken == watches.spoken >= 3


def test_watches_forget_who_was_not_met_for_longest():
    watches = BatchedMonitor(Adwin(), np.ones(2), 2, capacity=2)
    for user in ("ann", "bob", "ann", "cem"):
        watches.see([user], np.ones((1, 2)), [0])
    assert list(watches._users) == ["ann", "cem"]
    assert len(watches._n) == 2
    assert watches._n.sum() == 3


# ---------------------------------------------------------------- batching


def job(user, n=1, learn=True):
    return Job(user, torch.zeros(n, 1), learn)


def test_those_who_wait_share_a_call_but_no_user_and_no_kind_twice():
    calls = []

    def work(jobs):
        calls.append([(j.user, j.learn, len(j.windows)) for j in jobs])
        return [Refusal(404, "who?") if j.user == "nobody" else j.user for j in jobs]

    async def go():
        batcher = Batcher(work, rows=3, room=100)
        jobs = [job("a"), job("b"), job("a"), job("c", learn=False), job("d", 5, learn=False), job("nobody"), job("e")]
        found = await asyncio.gather(*(batcher.submit(j) for j in jobs), return_exceptions=True)
        await batcher.close()
        return found

    found = asyncio.run(go())
    assert [str(f) for f in found] == ["a", "b", "a", "c", "d", "who?", "e"]
    assert calls == [
        [("a", True, 1), ("b", True, 1), ("nobody", True, 1)],
        [("a", True, 1), ("e", True, 1)],
        [("c", False, 1)],
        [("d", False, 5)],
    ]


def test_nobody_is_overtaken_by_own_later_windows():
    calls = []

    async def go():
        batcher = Batcher(lambda jobs: calls.append([(j.user, j.learn) for j in jobs]) or list(jobs), rows=2)
        jobs = [job("b"), job("a", learn=False), job("a"), job("c")]
        await asyncio.gather(*(batcher.submit(j) for j in jobs))
        await batcher.close()

    asyncio.run(go())
    assert calls == [[("b", True), ("c", True)], [("a", False)], [("a", True)]]


def test_a_call_waits_for_requests_that_are_on_their_way_and_for_no_more():
    calls = []

    async def late(batcher, user, turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        await batcher.submit(job(user))

    async def go():
        batcher = Batcher(lambda jobs: calls.append([j.user for j in jobs]) or list(jobs), rows=4)
        on_their_way = (late(batcher, user, turns) for user, turns in (("a", 0), ("b", 2), ("c", 4), ("d", 40)))
        await asyncio.gather(*on_their_way)
        await batcher.close()

    asyncio.run(go())
    assert calls[0] == ["a", "b", "c"]
    assert calls[-1][-1] == "d"


def test_a_full_queue_refuses_and_what_nobody_waits_for_is_not_computed():
    served = []

    async def go():
        batcher = Batcher(lambda jobs: served.extend(j.user for j in jobs) or list(jobs), rows=1, room=3)
        waiting = [asyncio.create_task(batcher.submit(job(u))) for u in "abc"]
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        with pytest.raises(Refusal) as refused:
            await batcher.submit(job("d"))
        assert (refused.value.status, refused.value.wait) == (503, 1)
        waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert batcher.waiting == 0
        await batcher.close()

    asyncio.run(go())
    assert served == ["a", "c"]


def test_an_error_in_a_call_reaches_everybody_in_it_and_the_next_call_works():
    def work(jobs):
        if jobs[0].user == "a":
            raise RuntimeError("broken")
        return list(jobs)

    async def go():
        batcher = Batcher(work)
        first = await asyncio.gather(batcher.submit(job("a")), batcher.submit(job("b")), return_exceptions=True)
        second = await batcher.submit(job("b"))
        await batcher.close()
        return first, second

    first, second = asyncio.run(go())
    assert [str(e) for e in first] == ["broken", "broken"]
    assert second.user == "b"


# ---------------------------------------------------------------- wire and guard


@pytest.mark.parametrize(
    ("body", "binary", "match"),
    [
        (b"", True, "no whole windows"),
        (b"12345", True, "no whole windows"),
        (np.full(96, np.nan, "<f4").tobytes(), True, "NaN or Inf"),
        (np.zeros(96 * 5, "<f4").tobytes(), True, "5 windows in one request; send at most 4"),
        (b"{", False, "no JSON"),
        (b"[1]", False, "must be a JSON object"),
        (b"{}", False, '"windows" must be a list'),
        (b'{"windows": []}', False, '"windows" must be a list'),
        (b'{"windows": [[1, 2]]}', False, r"each of shape \[6, 16\]"),
        (b'{"windows": [[[1], [1, 2]]]}', False, '"windows" must be a list'),
        (b'{"windows": ["x"]}', False, '"windows" must be a list'),
    ],
)
def test_bad_windows_are_explained(body, binary, match):
    with pytest.raises(Refusal, match=match):
        windows_of(body, binary, SHAPE, most=4)


@pytest.mark.parametrize("values", [["run"], [3], [-1], [True], [None], "sit", None, [1.5]])
def test_unknown_labels_are_explained(values):
    with pytest.raises(Refusal, match="class"):
        labels_of(values, CLASSES)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "\x00"])
def test_names_are_printable(name):
    with pytest.raises(Refusal, match="printable"):
        checked_name(name)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"host": "0.0.0.0"}, "lets other machines in"),
        ({"token": "short"}, "16 ASCII characters"),
        ({"rate": -1.0}, "--rate"),
        ({"body": 0}, "--body"),
        ({"timeout": 0.0}, "--timeout"),
    ],
)
def test_access_that_is_unsafe_or_useless_is_refused(settings, match):
    with pytest.raises(UserError, match=match):
        Access(**settings)


def test_rates_are_kept_for_each_caller():
    now = [0.0]
    rates = Rates(1.0, clock=lambda: now[0])
    assert [rates.wait("ann") for _ in range(3)] == [0, 0, 1]
    assert rates.wait("bob") == 0
    now[0] = 1.0
    assert rates.wait("ann") == 0
    assert rates.wait("ann") == 1
