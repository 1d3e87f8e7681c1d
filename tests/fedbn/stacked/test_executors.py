"""Stacked training equals the training of each client by itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.context import RunContext
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import Server
from fedbn.federation.setup import build_context
from fedbn.models import build, models
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.roles import clone
from fedbn.personalization.base import personalizations
from fedbn.stacked.cohort import Cohort, Failure
from fedbn.stacked.executors import ClientExecutor, Kind, cores, parse_executor, stack_width
from fedbn.stacked.fit import FitConfig, StackedClient, fit_clients, step_schedule
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import build_program
from fedbn.stacked.steps import SGDStep
from fedbn.strategies.base import Progress, strategies
from fedbn.strategies.ownership import Ownership
from fedbn.tasks.classification import Classification
from fedbn_clients.app import app as client_app
from fedbn_clients.jobs import Train, execute, run_batched
from fedbn_simulations.engines.grid import InProcessGrid
from fedbn_simulations.flower.compat import task_identity
from fedbn_simulations.server.rounds import Listener, run_rounds
from tests.helpers import mostly_slow, same

STACKED = sorted(set(strategies()) - {"fedtan"})
"""All strategies but FedTAN, whose clients exchange statistics in the first step."""
QUICK = ("dbn", "evalnorm", "fedbn", "full-norm", "groupnorm", "hbn")
NETWORK = "tests.fedbn.stacked.test_executors:network"
VECTORIZED = "tests.fedbn.stacked.test_executors:mixed"
MODELS = {"digit-cnn", "har-cnn", "mlp", "resnet20", "small-cnn", NETWORK, VECTORIZED}
LARGE = {name for name in models() if name.endswith("-cvgj")}
MAPS = {"unet"}
"""Models with an output per pixel, which targets of one class per example do not fit."""
SLOW = ("resnet20", "digit-cnn", "binary-cnn", "binary-mlp", "image-cnn", "resmlp", "stroke-cnn")
ALL_MODELS = [
    *(
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in sorted(set(models()) - LARGE - MAPS)
    ),
    NETWORK,
    VECTORIZED,
]


def network(shape, classes):
    """A model with groups, strides, both kinds of dropout, functions and a residual connection."""
    return Everything(classes)


class Everything(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Dropout2d(0.3))
        self.second = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        h = self.first(x)
        h = F.relu(self.norm(self.second(h))) + h
        return self.head(self.drop(h.view(h.size(0), -1)))


class Overwriting(nn.Module):
    """Reads hidden activations again after a function has overwritten them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(self.first(x.flatten(1)))
        return self.last(F.relu(h, inplace=True)) + h


def overwriting(shape, classes):
    return nn.Sequential(Overwriting(), nn.Linear(8, classes))


def in_double_precision(ctx: RunContext) -> RunContext:
    """The context in double precision, with few rows per user and different sizes.

    Noise makes all pixels different: standardized filters map regions of one value to zero up to rounding, where
    rounding would decide about the gradient of ReLU.
    """
    draw = torch.Generator().manual_seed(0)

    def wide(data: Examples, rows: int) -> Examples:
        x = data.x[:rows].double()
        x += 1e-3 * torch.randn(x.shape, generator=draw, dtype=x.dtype)
        return Examples(x, data.y[:rows], data.recording[:rows])

    numbered = enumerate(ctx.population.users)
    users = tuple(User(u.name, u.domain, wide(u.train, 25 + 6 * i), wide(u.test, 4)) for i, u in numbered)
    population = Population(users, ctx.population.unseen, ctx.population.classes, ctx.population.skew)
    model = copy.deepcopy(ctx.scratch).double()
    return replace(ctx, population=population, scratch=model, initial=clone(model.state_dict()))


def run_n_rounds(ctx, executor, num_clients, rounds=2):
    """Final server state, client states and all losses of rounds executed by ``executor``."""
    server, client_states, losses = Server(ctx.initial_server_state(), ctx.initial_server_state()), {}, []
    for round in range(1, rounds + 1):
        jobs = [
            Train(ctx, u, server.state_for(ctx, u), client_states.get(u), Progress(round, rounds), (), server.broadcast)
            for u in ctx.trainers[:num_clients]
        ]
        results = executor.run(jobs)
        assert not any(isinstance(r, Failure) for r in results), results
        for job, (update, client_state) in zip(jobs, results, strict=True):
            assert job.user == update.user
            client_states[job.user] = client_state
            losses.append(update.loss)
        server.advance(ctx, [update for update, _ in results], round)
    return server.state, client_states, losses


def max_differences(a, b):
    """Largest difference of states and of losses between two results of `run_n_rounds`."""
    pairs = [(a[0], b[0]), *((a[1][u], b[1][u]) for u in a[1])]
    assert a[1].keys() == b[1].keys()
    assert all(x.keys() == y.keys() for x, y in pairs)
    differences = [float((x[k].double() - y[k].double()).abs().max()) for x, y in pairs for k in x]
    return max(differences), max(abs(x - y) for x, y in zip(a[2], b[2], strict=True))


def unequal_users_run(strategy="fedbn", model="mlp", **plan):
    """A run on users of different sizes, with two epochs and all options of plain SGD steps."""
    chosen = {"local_epochs": 2, "weight_decay": 0.01, "optimizer_state": "keep", "batch_size": 8, "lr": 0.02, **plan}
    partition = "dirichlet:alpha=0.5:clients=5"
    return Run("digits8", strategy, model=model, partition=partition, plan=plan_for("digits8", **chosen)).resolved()


def context_or_skip(run):
    try:
        return build_context(run)
    except UserError as error:
        pytest.skip(str(error))


CONVOLUTIONS = ("batch-renorm", "dbn", "fedbn", "fedwon", "groupnorm", "hbn", "instancenorm", "weight-standardization")
"""Strategies that are also tested with convolutions: one for each kind of layers."""


def strategies_and_models(names, *quick):
    """Pairs of a strategy and a model; by default the ``quick`` ones with ``mlp``."""
    pairs = [pytest.param(name, "mlp", marks=() if name in quick else pytest.mark.slow) for name in names]
    return pairs + [pytest.param(name, "small-cnn", marks=pytest.mark.slow) for name in CONVOLUTIONS]


@pytest.mark.parametrize(("name", "model"), strategies_and_models(STACKED, *QUICK))
def test_stacked_training_matches_every_strategy(name, model):
    ctx = in_double_precision(context_or_skip(unequal_users_run(name, model, proximal=0.1)))
    executor = ClientExecutor("stacked", 1)
    stacked = run_n_rounds(ctx, executor, 4)
    assert executor.execution == {"train": ["stacked"]}
    states, losses = max_differences(run_n_rounds(ctx, ClientExecutor("one"), 4), stacked)
    assert states < 1e-10
    assert losses < 1e-6  # the reference sums in single precision


@pytest.mark.parametrize("name", ALL_MODELS)
def test_stacked_training_matches_every_model(name):
    ctx = with_model(build_context(unequal_users_run(batch_size=8)), name)
    expected = run_n_rounds(ctx, ClientExecutor("one"), 3, rounds=1)
    for executor in (ClientExecutor("lean", 1), ClientExecutor("stacked", 1)):
        stacked = run_n_rounds(ctx, executor, 3, rounds=1)
        assert executor.execution == {"train": ["stacked"]} or name not in MODELS
        states, losses = max_differences(expected, stacked)
        assert states < 1e-10
        assert losses < 1e-5


def with_model(ctx, name):
    """The context with another model and a few random examples of a supported shape."""
    for shape in ((1, 8, 8), (2, 32), (64,)):
        try:
            model = build(name, shape, 10, 0).double()
            break
        except UserError:
            continue
    draw = torch.Generator().manual_seed(3)
    users = []
    for i, user in enumerate(ctx.population.users):
        n = 9 + 4 * i
        x = torch.randn(n, *shape, generator=draw, dtype=torch.float64)
        y = torch.randint(0, 10, (n,), generator=draw)
        users.append(User(user.name, user.domain, Examples(x, y, y * 0), user.test))
    population, ownership = replace(ctx.population, users=tuple(users)), Ownership.of(model, ctx.treatment)
    return replace(ctx, population=population, scratch=model, initial=clone(model.state_dict()), ownership=ownership)


@pytest.mark.parametrize("name", mostly_slow(personalizations(), "ditto", "apfl", "fedrep", "scaffold"))
def test_stacked_training_matches_every_personalization(name):
    ctx = in_double_precision(context_or_skip(unequal_users_run(f"fedbn+{name}", proximal=0.0)))
    one, stacked = (run_n_rounds(ctx, ClientExecutor(executor, 1), 3) for executor in ("one", "stacked"))
    assert max_differences(one, stacked)[0] < 1e-10


def test_program_rejects_sync_before_training(small):
    ctx = build_context(small())
    with pytest.raises(Unstackable, match="synchronizes statistics before training"):
        Cohort(ctx).program(Progress(1, 2), [{}])


# Steps.


@given(st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=1, max_size=5))
def test_step_schedule_covers_all_steps_in_order(sizes):
    taken = {i: [] for i in range(len(sizes))}
    for members, starts, size in step_schedule(sizes):
        assert len(set(members)) == len(members)
        for i, start in zip(members, starts, strict=True):
            assert start == sum(taken[i])
            taken[i].append(size)
    assert taken == dict(enumerate(sizes))


def test_step_schedule_groups_equal_clients():
    assert [len(members) for members, *_ in step_schedule([[4, 4, 2]] * 6)] == [6, 6, 6]


def test_fit_stack_groups_non_adjacent_clients():
    """The first and the last of three clients are copied out of the stack and back."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 2, (30,))
    sgd = FitConfig(SGDStep(0.1, 0.9, 0.1), mu=0.5, proximal=frozenset({"0.weight"}))
    sizes = [[4, 4, 2], [2, 4, 4], [4, 4, 2]]
    parts, state = [torch.arange(10 * i, 10 * i + 10).split(s) for i, s in enumerate(sizes)], net.state_dict()
    clients = [StackedClient(state, torch.cat(p), s, torch.Generator()) for p, s in zip(parts, sizes)]
    assert next(step_schedule(sizes)) == ((0, 2), [0, 0], 4)
    for client, stacked in zip(
        clients, fit_clients(build_program(net), clients, x, y, sgd, Classification()), strict=True
    ):
        (expected,) = fit_clients(build_program(net), [client], x, y, sgd, Classification())
        assert stacked.loss == pytest.approx(expected.loss, rel=1e-6)
        torch.testing.assert_close(stacked.state, expected.state, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stacked.optimizer_state, expected.optimizer_state, rtol=1e-10, atol=1e-12)


def test_training_preserves_method_state(small):
    note = {"method_state/note": torch.tensor([3.0])}
    jobs = [replace(job, client_state=note) for job in train_jobs(small("fedbn", model="mlp"), 2)]
    for executor in ("one", "stacked"):
        for _, client_state in ClientExecutor(executor, 1).run(jobs):
            assert torch.equal(client_state["method_state/note"], note["method_state/note"])


def test_fit_stack_skips_parameters_without_gradient():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    net = Half()
    state = clone(net.state_dict())
    x, y, rows = torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.arange(4)
    sgd = FitConfig(SGDStep(0.1, 0.9, 0.5))
    (done,) = fit_clients(
        build_program(net), [StackedClient(state, rows, [len(rows)], torch.Generator())], x, y, sgd, Classification()
    )
    assert torch.equal(done.state["unused.weight"], state["unused.weight"])
    assert not torch.equal(done.state["used.weight"], state["used.weight"])


# Executors and the grid.


def run_grid(run, executor, threads=2):
    users = len(build_context(run).population.users)
    grid = InProcessGrid(client_app, users, {"run": run.to_json()}, executor=executor)
    grid._executor.threads = threads
    outcomes = []
    with task_identity(1):
        run_rounds(grid, run, Listener(on_end=outcomes.append))
    return outcomes[0], dict(grid.client_states())


def test_threads_executor_is_bit_identical(small):
    run = small("fedbn", model="small-cnn", rounds=1)
    before = torch.get_rng_state()
    a, states_a = run_grid(run, "one")
    b, states_b = run_grid(run, "threads")
    assert torch.equal(before, torch.get_rng_state())
    assert same(a.server.state, b.server.state)
    assert a.curve == b.curve
    assert a.scores == b.scores
    assert all(same(state, states_b[key]) for key, state in states_a.items())


@pytest.mark.parametrize("executor", ["lean", "stacked", "auto"])
def test_grid_runs_stacked_executors(executor, small):
    run = small("silobn", model="mlp", clients_per_round=4)
    (a, _), (b, _) = run_grid(run, "one"), run_grid(run, executor)
    torch.testing.assert_close(b.server.state, a.server.state, rtol=1e-3, atol=1e-5)
    assert [p.train_loss for p in b.curve] == pytest.approx([p.train_loss for p in a.curve], rel=1e-4)
    if executor == "stacked":
        assert not same(a.server.state, b.server.state)  # otherwise the stack was not used


def train_jobs(run, users=None):
    """Training rounds of the first clients of a run; of all clients by default."""
    ctx = build_context(run)
    return [Train(ctx, u, ctx.initial_server_state(), None, Progress(1, 1)) for u in ctx.trainers[:users]]


def test_threads_require_clients_without_global_generator(small):
    executor = ClientExecutor("threads", 2)
    for model, thread_safe in ((NETWORK, False), ("mlp", True)):
        ctx = build_context(small(model=model, batch_size=16))
        executor._start_run(ctx)
        assert executor._is_thread_safe() is thread_safe


def test_threads_are_used_only_for_long_steps(small, monkeypatch):
    jobs, used = train_jobs(small(model="mlp")), []

    def record_parts(self, parts, do):
        used.append(len(parts))
        return [None] * len(parts)

    monkeypatch.setattr(ClientExecutor, "_on_threads", record_parts)
    for seconds, expected in ((1e9, []), (0.0, [len(jobs) - 3])):
        monkeypatch.setattr("fedbn.stacked.executors.MIN_THREADED_SECONDS", seconds)
        ClientExecutor("exact", 2).run(jobs)
        assert used == expected


@pytest.mark.parametrize("executor", ["one", "threads", "stacked"])
def test_failing_client_does_not_affect_others(executor, small):
    jobs = train_jobs(small("fedbn", model="mlp"))
    jobs[1] = replace(jobs[1], received={})
    results = ClientExecutor(executor, 2).run(jobs)
    assert [isinstance(r, Failure) for r in results] == [i == 1 for i in range(len(jobs))]
    assert isinstance(results[1].error, KeyError)
    ctx, user = jobs[0].ctx, jobs[0].user
    expected, _ = client_round(ctx, user, ctx.initial_server_state(), None, Progress(1, 1))
    rtol = 1e-3 if executor == "stacked" else 0
    torch.testing.assert_close(results[0][0].state, expected.state, rtol=rtol, atol=1e-6)


def test_stack_without_valid_clients_returns_all_failures(small):
    jobs = [replace(job, received={}) for job in train_jobs(small("fedbn", model="mlp"), 2)]
    assert [type(r.error) for r in ClientExecutor("stacked", 1).run(jobs)] == [KeyError, KeyError]


def test_fallback_reason_is_recorded_once(small):
    executor, jobs = ClientExecutor("stacked", 1), train_jobs(small("fedbn+fedrep", model="mlp"), 2)
    for _ in range(2):
        executor.run(jobs)
    assert executor.execution == {"train": ["the personalization method has its own training procedure"]}
    executor.run(train_jobs(small("fedbn", model="mlp"), 2))
    assert executor.execution == {"train": ["stacked"]}  # of the last run


def stop(*args, **kwargs):
    raise RuntimeError("wrong shape\nin a long message")


@pytest.mark.parametrize("failing", ["fit.Stack", "executors.stack_width", "cohort.checked_program"])
@pytest.mark.parametrize("executor", ["stacked", "auto"])
def test_training_falls_back_if_the_stacked_engine_fails(executor, failing, small, monkeypatch):
    jobs = train_jobs(small("fedbn", model="mlp"))
    expected = ClientExecutor("one", 1).run(jobs)
    monkeypatch.setattr(f"fedbn.stacked.{failing}", stop)
    chosen = ClientExecutor(executor, 1)
    for _ in range(2):
        for (update, state), (expected_update, expected_state) in zip(chosen.run(jobs), expected, strict=True):
            assert same(update.state, expected_update.state)
            assert same(state, expected_state)
            assert update.loss == expected_update.loss
    assert chosen.execution == {"train": ["the stacked engine failed with RuntimeError"]}


def test_training_that_fails_in_a_later_stack_has_no_effect(small, monkeypatch):
    jobs, calls = train_jobs(small("fedbn", model="mlp")), []

    def fails_later(*args):
        calls.append(args)
        return real(*args) if len(calls) == 1 else stop()

    real = Cohort.train
    monkeypatch.setattr(Cohort, "train", lambda self, *args: fails_later(self, *args))
    monkeypatch.setattr("fedbn.stacked.executors.stack_width", lambda *_: 2)
    expected, actual = ClientExecutor("one", 1).run(jobs), ClientExecutor("stacked", 1).run(jobs)
    assert len(calls) == 2
    assert all(same(a[0].state, e[0].state) and same(a[1], e[1]) for a, e in zip(actual, expected, strict=True))


def test_user_errors_are_raised_by_the_exact_executor(small, monkeypatch):
    def rejects(*args):
        raise UserError("stacked")

    jobs = train_jobs(small("fedbn", model="mlp"), 2)
    monkeypatch.setattr("fedbn.stacked.fit.Stack", rejects)
    executor = ClientExecutor("stacked", 1)
    assert all(not isinstance(result, Failure) for result in executor.run(jobs))
    monkeypatch.setattr("fedbn_clients.jobs.client_round", rejects)
    assert [str(result.error) for result in executor.run(jobs)] == ["stacked"] * 2
    assert executor.execution == {}


def test_auto_records_that_one_by_one_is_faster(small, monkeypatch):
    monkeypatch.setattr(ClientExecutor, "_select_executor", lambda *_: "threads")
    executor = ClientExecutor("auto", 1)
    executor.run(train_jobs(small("fedbn", model="mlp"), 2))
    assert executor.execution == {"train": ["one by one is faster on this machine"]}


@pytest.mark.parametrize(("longest", "expected"), [(2, "stacked"), (40, "lean")])
def test_auto_chooses_by_the_sizes_of_all_clients(longest, expected, small, monkeypatch):
    """A client with many more steps than the others is alone in its stack most of the time."""
    ctx = build_context(small("fedbn", model="mlp"))
    executor, users = ClientExecutor("auto", 2), ctx.trainers
    executor._start_run(ctx)
    executor._cohort.batch_sizes = {user: [8] * (longest if user == users[0] else 2) for user in users}
    seconds = {"threads": 9.0, "lean": 1.0, "stacked": 1.0 + 0.1 * (len(users) - 1)}
    measured = iter(seconds.values())
    monkeypatch.setattr("fedbn.stacked.executors._fastest_seconds", lambda _: next(measured))
    progress = Progress(1, 1)
    assert executor._select_executor(users, progress, executor._cohort.program(progress)) == expected


def mixed(shape, classes):
    """A network that needs ``torch.vmap``, with dropout and an operation in place on a view that is read again."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, (2, 1)), AnyBatchNorm(4), Mixed(), nn.Dropout(0.3), nn.Linear(72, classes))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, -1.0, 2.0]).view(4, 1, 1))

    def forward(self, x):
        rows = x[:, :2]
        rows += 1
        h = F.dropout2d(x * self.scale, 0.2, self.training)
        return h.reshape(len(x), -1)


def test_stacked_training_matches_models_that_overwrite():
    ctx = with_model(build_context(unequal_users_run(batch_size=8)), "tests.fedbn.stacked.test_executors:overwriting")
    one, executor = run_n_rounds(ctx, ClientExecutor("one"), 4), ClientExecutor("stacked", 1)
    states, losses = max_differences(one, run_n_rounds(ctx, executor, 4))
    assert executor.execution == {"train": ["stacked"]}
    assert states < 1e-10
    assert losses < 1e-5


def test_parse_executor_suggests_nearest_name():
    assert parse_executor("stacked") == "stacked"
    with pytest.raises(UserError, match="'stackd'.*stacked"):
        parse_executor("stackd")
    assert cores() >= 1


@given(st.integers(1, 500))
def test_stack_width_is_balanced(clients):
    ctx = build_context(unequal_users_run())
    width = stack_width(ctx, clients)
    assert 1 <= width <= min(clients, 128)
    stacks = -(-clients // width)
    assert stacks * width - clients < stacks * 2 or stacks == 1


# Suspended calls.


@dataclass(frozen=True)
class Job:
    kind: ClassVar[Kind] = "consensus"
    number: int

    def run(self):
        return -self.number


class OtherJob(Job):
    pass


def test_run_batched_groups_jobs_by_kind():
    batches = []

    def run(jobs):
        batches.append([(type(j).__name__, j.number) for j in jobs])
        return [Failure(ValueError("bad")) if j.number == 9 else 10 * j.number for j in jobs]

    def twice(n):
        return execute(Job(execute(Job(n))))

    def careful():
        try:
            return execute(Job(9))
        except ValueError as error:
            return str(error)

    calls = [lambda: twice(1), lambda: execute(OtherJob(2)), careful, lambda: "none", lambda: twice(3)]
    assert run_batched(calls, run) == [100, 20, "bad", "none", 300]
    assert batches == [[("Job", 1), ("Job", 9), ("Job", 3)], [("OtherJob", 2)], [("Job", 10), ("Job", 30)]]
    assert execute(Job(4)) == -4
