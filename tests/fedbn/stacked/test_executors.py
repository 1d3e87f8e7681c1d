"""Stacked training equals the training of each client by itself."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from clients.app import app as client_app
from clients.jobs import Train, execute, run_batched
from fedbn.data.population import Examples, Population, User
from fedbn.errors import UserError
from fedbn.federation.client import client_round
from fedbn.federation.context import RunContext
from fedbn.federation.run import Run, plan_for
from fedbn.federation.server import Server
from fedbn.federation.setup import build_context
from fedbn.models import build, models
from fedbn.nn.batchnorm import AnyBatchNorm, AnyInstanceNorm
from fedbn.nn.roles import clone
from fedbn.personalization.base import personalizations
from fedbn.stacked.cohort import Cohort, Failure
from fedbn.stacked.executors import ClientExecutor, Kind, cores, parse_executor, stack_width
from fedbn.stacked.fit import SGDConfig, StackedClient, fit_stack, step_schedule
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import build_program, check_program
from fedbn.strategies.base import Progress, strategies
from fedbn.strategies.ownership import Ownership
from simulations.engines.grid import InProcessGrid
from simulations.flower.compat import task_identity
from simulations.server.rounds import Listener, run_rounds
from tests.helpers import same

STACKED = {  # must be stackable; strategies with custom steps or layers train client by client
    *("centralized", "fedbn", "fedbn-seeded", "fixbn", "global-naive", "global-pooled", "global-recalibrated"),
    *("groupnorm", "instancenorm", "layernorm", "local", "mtfl", "nonorm", "params-only", "silobn"),
}
NETWORK = "tests.fedbn.stacked.test_executors:network"
MODELS = {"digit-cnn", "har-cnn", "mlp", "resnet20", "small-cnn", NETWORK}
ALL_MODELS = [*sorted(name for name in models() if not name.endswith("-cvgj")), NETWORK]  # without the large ones


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


def in_double_precision(ctx: RunContext) -> RunContext:
    """The context in double precision, with few rows per user and different sizes."""

    def wide(data: Examples, rows: int) -> Examples:
        return Examples(data.x[:rows].double(), data.y[:rows], data.recording[:rows])

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


@pytest.mark.parametrize(
    ("name", "model"), [*((n, "mlp") for n in strategies()), *((n, "small-cnn") for n in sorted(STACKED))]
)
def test_stacked_training_matches_every_strategy(name, model, caplog):
    if strategies()[name].syncs_first_batch:
        pytest.skip("synchronizes statistics before training: see test_program_rejects_sync_before_training")
    ctx = in_double_precision(context_or_skip(unequal_users_run(name, model, proximal=0.1)))
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        stacked = run_n_rounds(ctx, ClientExecutor("stacked", 1), 4)
    assert not caplog.messages or name not in STACKED, caplog.messages
    states, losses = max_differences(run_n_rounds(ctx, ClientExecutor("one"), 4), stacked)
    assert states < 1e-10
    assert losses < 1e-6  # the reference sums in single precision


@pytest.mark.parametrize("name", ALL_MODELS)
def test_stacked_training_matches_every_model(name, caplog):
    ctx = with_model(build_context(unequal_users_run(batch_size=8)), name)
    expected = run_n_rounds(ctx, ClientExecutor("one"), 3, rounds=1)
    for executor in ("lean", "stacked"):
        with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
            stacked = run_n_rounds(ctx, ClientExecutor(executor, 1), 3, rounds=1)
        assert not caplog.messages or name not in MODELS, caplog.messages
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


@pytest.mark.parametrize("name", personalizations())
def test_stacked_training_matches_every_personalization(name):
    ctx = in_double_precision(context_or_skip(unequal_users_run(f"fedbn+{name}", proximal=0.0)))
    one, stacked = (run_n_rounds(ctx, ClientExecutor(executor, 1), 3) for executor in ("one", "stacked"))
    assert max_differences(one, stacked)[0] < 1e-10


def test_program_rejects_sync_before_training(small):
    ctx = build_context(small())
    with pytest.raises(Unstackable, match="synchronizes statistics before training"):
        Cohort(ctx).program(Progress(1, 2), [{}])


# Kernels.

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2, bias=False), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), 1, (1, 2)), (4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "bn of features": (lambda: nn.BatchNorm1d(5), (5,)),
    "bn of signals": (lambda: nn.BatchNorm1d(5, momentum=0.3), (5, 4)),
    "bn of images": (lambda: AnyBatchNorm(3, affine=False), (3, 4, 5)),
    "bn without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 5)),
    "instance": (lambda: AnyInstanceNorm(3, affine=True), (3, 4, 5)),
    "instance with statistics": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (3, 6)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "layer": (lambda: nn.LayerNorm((3, 5)), (3, 5)),
    "layer of the last axis": (lambda: nn.LayerNorm(5), (3, 5)),
    "max pool": (lambda: nn.MaxPool1d(3, 2, 1), (3, 9)),
    "average pool": (lambda: nn.AvgPool1d(2, ceil_mode=True), (3, 9)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (3, 5, 4)),
    "flatten": (lambda: nn.Flatten(), (3, 5)),
    "activation": (lambda: nn.GELU(), (3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@given(k=st.integers(1, 4), rows=st.integers(2, 5), training=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_stacked_layer_matches_separate_layers(name, k, rows, training, seed):
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    separate = []
    for _ in range(k):
        net = nn.Sequential(make()).double().train(training)
        for value in net.state_dict().values():  # including running statistics, so that all clients differ
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
        separate.append(net)
    program = build_program(separate[0])
    stacked = {n: torch.stack([net.state_dict()[n] for net in separate]) for n in separate[0].state_dict()}
    x = torch.randn(rows, k, *shape, dtype=torch.float64)
    out = program.bind({n: program.lay_out(n, v) for n, v in stacked.items()}, k)(x.flatten(1, 2))
    for i, net in enumerate(separate):
        expected = net(x[:, i])
        actual = out.view(rows, k, -1, *out.shape[2:])[:, i]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        own = {key: value[i] for key, value in stacked.items()}
        torch.testing.assert_close(own, dict(net.state_dict()), rtol=1e-10, atol=1e-10)


class Doubled(nn.ReLU):
    def forward(self, input):
        return 2 * input


class Own(nn.Module):
    def __init__(self, function, module=None):
        super().__init__()
        self.function, self.inner, self.scale = function, module, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.function(self, x)


def hooked():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_pre_hook(lambda module, args: None)
    return net


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


class Overwriting(nn.Module):
    """A network with an in-place operation on its hidden activations, which may be read again."""

    def __init__(self, overwrite, read_again):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.overwrite, self.read_again = overwrite, read_again

    def forward(self, x):
        hidden = self.first(x)
        out = self.last(self.overwrite(hidden))
        return out + hidden if self.read_again else out


def add_in_place(x):
    x += 1
    return x


@pytest.mark.parametrize("read_again", [True, False])
@pytest.mark.parametrize(
    ("overwrite", "is_traced"),  # whether the trace keeps that the operation is in place
    [
        (nn.ReLU(inplace=True), True),
        (nn.SiLU(inplace=True), True),
        (nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)), True),
        (lambda x: nn.functional.silu(x, True), True),
        (nn.Dropout(0.5, inplace=True), False),
        (lambda x: nn.functional.relu(x, inplace=True), False),
        (add_in_place, False),
    ],
)
def test_check_program_rejects_overwritten_tensors_read_again(overwrite, is_traced, read_again):
    net, x = Overwriting(overwrite, read_again), torch.randn(6, 4)
    differs = read_again and not is_traced
    with pytest.raises(Unstackable, match="differs from the model") if differs else nullcontext():
        check_program(build_program(net), net, x)


def test_check_program_rejects_relu_delayed_past_pooling():
    net = Own(
        lambda self, x: self.inner(h := x + 1) + F.max_pool1d(h, 2),
        nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool1d(2)),
    )
    net.scale = None
    with pytest.raises(Unstackable):
        check_program(build_program(net), net, torch.randn(4, 2, 6))


def test_check_program_rejects_additions_that_mix_clients():
    net = Own(lambda self, x: self.inner(x) + x.mean((2, 3), keepdim=True), nn.Conv2d(2, 1, 1))
    net.scale = None
    with pytest.raises(Unstackable, match="differs from the model"):
        check_program(build_program(net), net, torch.randn(4, 2, 3, 3))


@pytest.mark.parametrize("overwrite", [nn.ReLU(inplace=True), lambda x: F.relu(x, inplace=True), add_in_place])
def test_stacked_training_matches_models_that_overwrite(overwrite, register_model, small):
    def make(shape, classes):
        hidden = Overwriting(overwrite, read_again=True)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), hidden, nn.Linear(4, classes))

    ctx = in_double_precision(build_context.__wrapped__(small(model=register_model(make), rounds=1)))
    one, stacked = (run_n_rounds(ctx, ClientExecutor(executor, 1), 3) for executor in ("one", "stacked"))
    assert max_differences(one, stacked)[0] < 1e-10


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), Doubled()), "function mul"),
        (nn.Sequential(nn.PReLU()), "layer PReLU"),
        (nn.Sequential(nn.BatchNorm1d(4, momentum=None)), "averages cumulatively"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), "pads with circular"),
        (nn.Sequential(nn.MaxPool1d(2, return_indices=True)), "returns indices"),
        (hooked(), "has hooks"),
        (tied(), "share parameters"),
        (Own(lambda self, x: x + self.scale), "scale, a tensor that no supported layer owns"),
        (Own(lambda self, x: torch.relu(x)), "scale is not used"),
        (Own(lambda self, x: x if x.sum() > 0 else -x), "cannot be traced"),
        (Own(lambda self, x: (x, x)), "one tensor to one tensor"),
        (Own(lambda self, x: x.sort()), "method sort"),
    ],
)
def test_build_program_rejects_unsupported_models(model, reason):
    with pytest.raises(Unstackable, match=reason):
        build_program(model)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.flatten(0), "flatten from axis 0"),
        (lambda x: x.mean(1), "not positions"),
        (lambda x: x.mean(), "not positions"),
        (lambda x: x.view(-1, 2), "reshape to"),
        (lambda x: x.unsqueeze(1), "unsqueeze at axis 1"),
        (lambda x: x.view(x.size(1), -1), "size of an axis"),
    ],
)
def test_program_rejects_operations_that_mix_clients(function, reason):
    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(Unstackable, match=reason):
        build_program(Net()).bind({}, 2)(torch.zeros(3, 4, 2))
    with pytest.raises(Unstackable, match="with 3 axes"):
        build_program(net := nn.Sequential(nn.Linear(2, 2))).bind(net.state_dict(), 1)(torch.zeros(3, 4, 2))


# Steps.


@given(st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=1, max_size=5))
def test_step_schedule_covers_all_steps_in_order(sizes):
    taken = {i: [] for i in range(len(sizes))}
    for group in step_schedule(sizes):
        assert len({sizes[i][step] for i, step in group}) == 1
        assert len({i for i, _ in group}) == len(group)
        for i, step in group:
            taken[i].append(step)
    assert taken == {i: list(range(len(own))) for i, own in enumerate(sizes)}


def test_step_schedule_groups_equal_clients():
    assert [len(group) for group in step_schedule([[4, 4, 2]] * 6)] == [6, 6, 6]


def test_fit_stack_groups_non_adjacent_clients():
    """The first and the last of three clients are copied out of the stack and back."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 2, (30,))
    sgd = SGDConfig(0.1, momentum=0.9, weight_decay=0.1, mu=0.5, proximal=frozenset({"0.weight"}))
    sizes = [[4, 4, 2], [2, 4, 4], [4, 4, 2]]
    parts, state = [torch.arange(10 * i, 10 * i + 10).split(s) for i, s in enumerate(sizes)], net.state_dict()
    clients = [StackedClient(state, torch.cat(p), s, torch.Generator()) for p, s in zip(parts, sizes)]
    assert next(step_schedule(sizes)) == [(0, 0), (2, 0)]
    for client, stacked in zip(clients, fit_stack(build_program(net), clients, x, y, sgd), strict=True):
        (expected,) = fit_stack(build_program(net), [client], x, y, sgd)
        assert stacked.loss == pytest.approx(expected.loss, rel=1e-6)
        torch.testing.assert_close(stacked.state, expected.state, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stacked.momentum, expected.momentum, rtol=1e-10, atol=1e-12)


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
    sgd = SGDConfig(0.1, momentum=0.9, weight_decay=0.5)
    (done,) = fit_stack(build_program(net), [StackedClient(state, rows, [len(rows)], torch.Generator())], x, y, sgd)
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
    records = {node: context.state.array_records for node, context in grid.contexts.items()}
    return outcomes[0], {(n, k): r.to_torch_state_dict() for n, rs in records.items() for k, r in rs.items()}


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


def test_errors_in_stacked_code_are_raised(small, monkeypatch):
    def broken(*args):
        raise RuntimeError("wrong shape")

    monkeypatch.setattr("fedbn.stacked.cohort.fit_stack", broken)
    with pytest.raises(RuntimeError, match="wrong shape"):
        ClientExecutor("stacked", 1).run(train_jobs(small("fedbn", model="mlp"), 2))


def test_fallback_reason_is_logged_once(small, caplog):
    executor, jobs = ClientExecutor("stacked", 1), train_jobs(small("fedbn+fedrep", model="mlp"), 2)
    with caplog.at_level(logging.INFO, logger="fedbn.stacked.executors"):
        executor.run(jobs)
        executor.run(jobs)
    assert caplog.messages == ["training client by client: fedrep has its own training procedure"]


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
