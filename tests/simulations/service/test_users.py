from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load

pytest.importorskip("fastapi")

from fedbn.data.sensors import SensorLimits
from fedbn.errors import UserError
from fedbn.models import build
from fedbn.online import SQLiteStore, personalize
from fedbn_simulations.service.access import Access, RateLimiter
from fedbn_simulations.service.batching import Batcher, Job
from fedbn_simulations.service.schema import Answer, RequestError, advice, parse_labels, parse_windows, validate_name
from fedbn_simulations.service.users import Limits, UserStore

SHAPE, CLASSES = (6, 16), ("sit", "walk", "lie")


@pytest.fixture(scope="module")
def model():
    net = build("har-cnn", SHAPE, len(CLASSES), seed=0)
    net(torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1)))
    return net.eval()


def make_users(model, *enrolled, **options):
    users = UserStore(model, SHAPE, CLASSES, **{"rule": "pseudo:n0=4", **options})
    for name in enrolled:
        assert users.enroll(name)
    return users


def windows(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def observe(users, user, x, learn=True, hold=False):
    [answer] = users.answer([Job(user, x, learn, hold)])
    if isinstance(answer, Exception):
        raise answer
    return answer


# ---------------------------------------------------------------- users


def test_detectors_observe_the_windows_of_their_user_in_order():
    observed = []

    class Monitor:
        def observe(self, users, means, predicted):
            observed.append((users, means.tolist(), predicted.tolist()))
            return [(float(m), m in (11, 14)) for m in means]

    jobs = [SimpleNamespace(user=user, n=n) for user, n in (("ann", 2), ("bob", 1), ("cem", 3))]
    means, predicted = np.arange(10, 16), np.arange(20, 26)
    store = SimpleNamespace(monitor=Monitor())
    drift = UserStore._detect_drift(store, jobs, np.array([0, 2, 3, 6]), means, predicted)
    assert observed == [
        (["ann", "bob", "cem"], [10, 12, 13], [20, 22, 23]),
        (["ann", "cem"], [11, 14], [21, 24]),
        (["cem"], [15], [25]),
    ]
    assert drift == {"ann": (11.0, True), "bob": (12.0, False), "cem": (15.0, True)}


def test_windows_of_a_wrong_unit_are_refused_and_saturated_ones_not_learned(model):
    users = make_users(model, "ann", "bob", sensors=SensorLimits((0, 1, 2), 1.0))
    right = 0.1 * windows(3)
    right[:, 2] += 1
    saturated = right.clone()
    saturated[1, 0] = (6 * torch.linspace(-1, 1, SHAPE[1])).clamp(-2, 2)
    wrong, good = users.answer([Job("ann", 9.81 * right, True), Job("bob", saturated, True)])
    assert isinstance(wrong, RequestError)
    assert (wrong.status, "times gravity" in str(wrong)) == (422, True)
    assert (good.saturated, advice(good, CLASSES)["action"]) == (1, "check")
    assert "saturated in 1 of 3 windows" in advice(good, CLASSES)["text"]
    assert [users.report(name)["learned"] for name in ("ann", "bob")] == [0, 2]
    assert observe(users, "bob", right, learn=False).saturated == 0
    for enter in (
        lambda: users.learn("bob", 9.81 * right, [0, 1, 2]),
        lambda: users.calibrate("bob", 0 * right, None, "adapt"),
    ):
        with pytest.raises(RequestError, match="times gravity"):
            enter()


def test_batched_answers_equal_single_predictions(model):
    names = ["ann", "bob", "cem"]
    users, reference = make_users(model, *names), personalize(model, "pseudo:n0=4")
    for t in range(5):
        jobs = [Job(name, windows(1 + i, 10 * t + i), True) for i, name in enumerate(names)]
        answers = users.answer(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            out = reference.predict(job.windows, job.user)
            reference.commit(posterior=out.softmax(1))
            np.testing.assert_allclose(answer.predictions, out.softmax(1).numpy(), atol=1e-5)
            assert answer.user == job.user


def test_held_windows_are_learned_once_with_their_labels(model):
    users, reference = make_users(model, "ann"), personalize(model, "pseudo:n0=4")
    x = windows(2)
    before = users.snapshot("ann")
    answer = observe(users, "ann", x, learn=False, hold=True)
    assert users.snapshot("ann") == before
    assert users.commit("ann", dict(zip(answer.held, [1, 2], strict=True))) == 2
    reference.predict(x, "ann")
    reference.commit(label=torch.tensor([1, 2]))
    assert users.snapshot("ann") == reference.state("ann").to_bytes()
    with pytest.raises(RequestError, match="no longer\\) held"):
        users.commit("ann", {answer.held[0]: 1})


def test_held_windows_are_per_user_and_oldest_are_dropped(model):
    users = make_users(model, "ann", "bob", limits=Limits(held=2))
    first, second, third = observe(users, "ann", windows(3), learn=False, hold=True).held
    with pytest.raises(RequestError, match="no longer\\) held"):
        users.commit("ann", {second: 0, first: 0})
    with pytest.raises(RequestError, match="no longer\\) held"):
        users.commit("bob", {second: 0})
    assert users.commit("ann", {second: 0, third: 1}) == 2


def test_states_survive_eviction_and_restart(model, tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    users = make_users(model, store=store, limits=Limits(capacity=2))
    for i, name in enumerate(("ann", "bob", "cem")):
        users.enroll(name)
        observe(users, name, windows(3, i))
    assert users.num_in_memory == 2
    before = {name: users.snapshot(name) for name in ("ann", "bob", "cem")}
    users.journal.commit()
    restarted = make_users(model, store=store)
    assert restarted.users("", 10) == ["ann", "bob", "cem"]
    assert restarted.users("ann", 1) == ["bob"]
    assert {name: restarted.snapshot(name) for name in before} == before
    with pytest.raises(UserError, match="belongs to rule"):
        make_users(model, store=store, rule="ema")


def test_snapshot_merge_export_and_forget(model, tmp_path):
    store = SQLiteStore(tmp_path / "users.db")
    users = make_users(model, "ann", "ann2", store=store)
    observe(users, "ann", windows(4, 1))
    observe(users, "ann2", windows(4, 2))
    merged = users.net.state("ann").merge(users.net.state("ann2"))
    users.restore("ann", users.snapshot("ann2"), merge=True)
    assert users.net.state("ann").n == merged.n == 8
    plain = build("har-cnn", SHAPE, len(CLASSES), seed=0)
    plain.load_state_dict(load(users.export("ann")))
    x = windows(3, 3)
    expected = observe(users, "ann", x, learn=False, hold=True)
    np.testing.assert_allclose(plain.eval()(x).softmax(1).detach().numpy(), expected.predictions, atol=1e-5)
    users.flush()
    users.journal.commit()
    assert list(store) == ["ann", "ann2"]
    users.forget("ann")
    users.journal.commit()
    assert users.users("", 10) == ["ann2"]
    assert list(store) == ["ann2"]
    assert not users.held.of("ann")
    for method in (users.snapshot, users.forget, users.report, users.reset, users.export):
        with pytest.raises(RequestError, match="enroll the user first"):
            method("ann")
    with pytest.raises(UserError, match="not a user.s state"):
        users.restore("ann2", b"nonsense", merge=False)


def test_enroll_is_limited_by_capacity_without_store(model):
    users = make_users(model, "ann", limits=Limits(capacity=1))
    with pytest.raises(RequestError, match="fill the memory") as error:
        users.enroll("bob")
    assert error.value.status == 507
    users.forget("ann")
    assert users.enroll("bob")


def test_calibration_changes_the_advice(model):
    users = make_users(model, "ann")
    answer = observe(users, "ann", windows(1))
    assert advice(answer, CLASSES)["action"] == "calibrate"
    users.calibrate("ann", windows(3), [0, 1, 2], "adapt")
    answer = observe(users, "ann", windows(1))
    assert answer.calibrated
    assert advice(answer, CLASSES)["action"] == "none"
    drifted = Answer("ann", answer.predictions, 1.0, True, 1, answer.class_counts, True)
    assert advice(drifted, CLASSES) == advice(drifted, CLASSES) | {"action": "recalibrate", "classes": list(CLASSES)}


@pytest.mark.parametrize("name", ["capacity", "held", "windows"])
def test_limits_reject_zero(name):
    with pytest.raises(UserError, match=f"--{name} must be at least 1"):
        Limits(**{name: 0})


# ---------------------------------------------------------------- batching


def job(user, n=1, learn=True):
    return Job(user, torch.zeros(n, 1), learn)


def submit(handler, *batches, **options):
    """Results or errors of jobs; those of a batch are submitted at once."""

    async def run():
        batcher = Batcher(handler, **options)
        results = [await asyncio.gather(*(batcher.submit(j) for j in jobs), return_exceptions=True) for jobs in batches]
        await batcher.close()
        return results

    return asyncio.run(run())


def test_batch_has_one_job_per_user_and_one_type():
    calls = []

    def handler(jobs):
        calls.append([(j.user, j.learn, len(j.windows)) for j in jobs])
        return [RequestError(404, "unknown") if j.user == "x" else j.user for j in jobs]

    jobs = [job("a"), job("b"), job("a"), job("c", learn=False), job("d", 5, learn=False), job("x"), job("e")]
    (results,) = submit(handler, jobs, max_batch=3, max_queue=100)
    assert [str(result) for result in results] == ["a", "b", "a", "c", "d", "unknown", "e"]
    assert calls == [
        [("a", True, 1), ("b", True, 1), ("x", True, 1)],
        [("a", True, 1), ("e", True, 1)],
        [("c", False, 1)],
        [("d", False, 5)],
    ]


def test_windows_of_a_user_stay_in_order():
    calls, jobs = [], [job("b"), job("a", learn=False), job("a"), job("c")]
    (results,) = submit(lambda jobs: calls.append([(j.user, j.learn) for j in jobs]) or list(jobs), jobs, max_batch=2)
    assert results == jobs
    assert calls == [[("b", True), ("c", True)], [("a", False)], [("a", True)]]


def test_batch_waits_for_requests_about_to_arrive():
    calls = []

    async def submit_later(batcher, user, turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        await batcher.submit(job(user))

    async def run():
        batcher = Batcher(lambda jobs: calls.append([j.user for j in jobs]) or list(jobs), max_batch=4)
        submissions = (submit_later(batcher, user, turns) for user, turns in (("a", 0), ("b", 2), ("c", 4), ("d", 40)))
        await asyncio.gather(*submissions)
        await batcher.close()

    asyncio.run(run())
    assert calls[0] == ["a", "b", "c"]
    assert calls[-1][-1] == "d"


def test_full_queue_rejects_and_canceled_jobs_are_dropped():
    processed = []

    async def run():
        batcher = Batcher(lambda jobs: processed.extend(j.user for j in jobs) or list(jobs), max_batch=1, max_queue=3)
        tasks = [asyncio.create_task(batcher.submit(job(u))) for u in "abc"]
        await asyncio.sleep(0)
        assert batcher.queued == 3
        with pytest.raises(RequestError) as error:
            await batcher.submit(job("d"))
        assert (error.value.status, error.value.retry_after) == (503, 1)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batcher.queued == 0
        await batcher.close()

    asyncio.run(run())
    assert processed == ["a", "c"]


def test_handler_error_is_returned_to_its_batch_only():
    def handler(jobs):
        if jobs[0].user == "a":
            raise RuntimeError("broken")
        return list(jobs)

    first, (second,) = submit(handler, [job("a"), job("b")], [job("b")])
    assert [str(e) for e in first] == ["broken", "broken"]
    assert second.user == "b"


# ---------------------------------------------------------------- parsing and access


@pytest.mark.parametrize(
    ("body", "binary", "match"),
    [
        (b"", True, "not a whole number of windows"),
        (b"12345", True, "not a whole number of windows"),
        (np.full(96, np.nan, "<f4").tobytes(), True, "NaN or Inf"),
        (np.zeros(96 * 5, "<f4").tobytes(), True, "5 windows in one request; send at most 4"),
        (b"{", False, "not JSON"),
        (b"[1]", False, "must be a JSON object"),
        (b"{}", False, '"windows" must be a list'),
        (b'{"windows": []}', False, '"windows" must be a list'),
        (b'{"windows": [[1, 2]]}', False, r"each of shape \[6, 16\]"),
        (b'{"windows": [[[1], [1, 2]]]}', False, '"windows" must be a list'),
        (b'{"windows": ["x"]}', False, '"windows" must be a list'),
        (b'{"windows": [["1", "2"]]}', False, '"windows" must be a list'),
        (b'{"windows": [' + b"[]," * 400 + b"[]]}", False, "more elements than the largest valid request"),
        (b'{"windows": [' + b"1," * 4 + b"1]}", False, "5 windows in one request; send at most 4"),
        (json.dumps({"windows": np.full((1, *SHAPE), 1e39).tolist()}).encode(), False, "NaN or Inf"),
    ],
    ids=range(15),
)
def test_parse_windows_rejects_bad_input(body, binary, match):
    with pytest.raises(RequestError, match=match):
        parse_windows(body, binary, SHAPE, limit=4, elements=700)


@pytest.mark.parametrize("values", [["run"], [3], [-1], [True], [None], "sit", None, [1.5]])
def test_parse_labels_rejects_bad_input(values):
    with pytest.raises(RequestError, match="class"):
        parse_labels(values, CLASSES)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "\x00"])
def test_validate_name_rejects_bad_input(name):
    with pytest.raises(RequestError, match="printable"):
        validate_name(name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"host": "0.0.0.0"}, "accepts requests from other machines"),
        ({"token": "short"}, "16 ASCII characters"),
        ({"rate": -1.0}, "--rate"),
        ({"body": 0}, "--body"),
        ({"timeout": 0.0}, "--timeout"),
    ],
)
def test_access_rejects_bad_input(options, match):
    with pytest.raises(UserError, match=match):
        Access(**options)


def test_rate_limiter_is_per_caller():
    now = [0.0]
    limiter = RateLimiter(1.0, clock=lambda: now[0])
    assert [limiter.acquire("ann") for _ in range(3)] == [0, 0, 1]
    assert limiter.acquire("bob") == 0
    now[0] = 1.0
    assert limiter.acquire("ann") == 0
    assert limiter.acquire("ann") == 1
