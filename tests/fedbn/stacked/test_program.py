"""The layouts and optimizations of the stacked program do not change the results of the model."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.federation.setup import build_context
from fedbn.nn.roles import clone
from fedbn.stacked import fit, layers
from fedbn.stacked.executors import ClientExecutor
from fedbn.stacked.fit import FitConfig, StackedClient, fit_clients
from fedbn.stacked.layers import mkldnn_linear
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn.stacked.program import build_program
from fedbn.stacked.steps import SGDStep
from fedbn.strategies.base import Progress
from fedbn.tasks.classification import Classification
from fedbn_clients.jobs import Train


def features(dropout=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, 3))
    return net.double()


def train_stacked_and_separately(net, x, y, sgd, clients=3, noise=False):
    """Results of clients trained in one stack, and of each in its own stack."""
    rows = len(y) // clients
    state = clone(net.state_dict())

    def client(i):
        draw = torch.Generator().manual_seed(i) if noise else None
        return StackedClient(state, torch.arange(rows), [rows // 2, rows - rows // 2], draw, first=i * rows)

    program = build_program(net)
    separate = [fit_clients(program, [client(i)], x, y, sgd, Classification())[0] for i in range(clients)]
    return fit_clients(program, [client(i) for i in range(clients)], x, y, sgd, Classification()), separate


def assert_close(a, b, **tolerance):
    torch.testing.assert_close([r.state for r in a], [r.state for r in b], **tolerance)


class Flat(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.head = function, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.function(x))


@pytest.mark.parametrize(
    ("net", "axes", "expected"),
    [
        (features(), 2, True),
        (features(), 4, False),  # positions that are not flattened
        (nn.Sequential(nn.Flatten(), *features()), 4, True),
        (nn.Sequential(nn.Flatten(2), *features()), 3, False),
        (Flat(lambda x: x.flatten(1)), 4, True),
        (Flat(lambda x: x.flatten(2)), 4, False),
        (Flat(lambda x: torch.relu(x)), 2, True),
        (Flat(lambda x: x.view(x.size(0), -1)), 4, False),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 2, False),
        (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(4, 3)), 3, False),
    ],
)
def test_batch_last_requires_a_model_without_positions(net, axes, expected):
    assert build_program(net).supports_batch_last(axes) is expected


@pytest.mark.parametrize("noise", [False, True])
def test_batch_first_and_batch_last_layouts_match(noise):
    net = features(dropout=0.4 if noise else 0.0)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 3, (30,))
    # A stack of one client is batch first.
    stacked, separate = train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.1)), noise=noise)
    assert_close(stacked, separate, rtol=1e-10, atol=1e-12)
    assert not torch.equal(separate[0].state["0.weight"], separate[1].state["0.weight"])  # clients have different rows


@pytest.mark.parametrize("first", [True, False])
def test_fused_linear_step_matches_sgd(first, monkeypatch):
    torch.manual_seed(1)
    modules = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)]
    net = nn.Sequential(*modules if first else modules[1:]).double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
    stacked, expected = train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.1)))
    monkeypatch.setattr(fit, "MIN_FUSED_SIZE", 1)
    used = []
    real = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a, **k: used.append(1) or real(*a, **k))
    _, stepped = train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.1)))
    assert len(used) == 3 * 2 * (1 + first)  # clients, steps, and layers with a bias
    assert_close(stepped, expected, rtol=1e-12, atol=1e-14)
    assert_close(stacked, expected, rtol=1e-12, atol=1e-14)
    used.clear()
    train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.1, 0.9)))  # the buffer needs the gradient
    assert not used


@pytest.mark.parametrize("intel", [True, False])
def test_processor_vendor_decides_how_input_gradients_are_multiplied(intel, monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "is_intel", lambda: intel)
    monkeypatch.setattr(layers, "mkldnn_linear", lambda *a: calls.append(a) or F.linear(*a))
    x, weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6), torch.randn(3, requires_grad=True)
    expected = torch.ones(4, 3) @ weight
    layers._FusedLinearStep.apply(x, weight, bias, 0.1).sum().backward()
    assert len(calls) == (1 if intel else 2)  # in the forward pass, and in both
    torch.testing.assert_close(x.grad, expected)


def test_fused_linear_step_in_bfloat16_matches_sgd(monkeypatch):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    config = FitConfig(SGDStep(0.5), precision="bfloat16")
    _, expected = train_stacked_and_separately(net, x, y, config)
    _, single = train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.5)))
    monkeypatch.setattr(fit, "MIN_FUSED_SIZE", 1)
    monkeypatch.setattr(layers, "UPDATE_BLOCK", 12)  # blocks of two rows, and a last one of one
    updated, real = [], torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda t, *a, **k: updated.append(t.shape) or real(t, *a, **k))
    _, stepped = train_stacked_and_separately(net, x, y, config)
    assert updated.count((2, 6)) == 3 * updated.count((1, 6)) == 3 * 3 * 2  # blocks, clients and steps
    assert_close(stepped, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(single[0].state["0.weight"], expected[0].state["0.weight"], rtol=1e-5, atol=1e-6)


def test_layer_that_runs_twice_is_not_fused(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    net = Twice().double()
    assert build_program(net).fusable_weights == ()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 4, (12,))
    _, expected = train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.1)))
    monkeypatch.setattr(fit, "MIN_FUSED_SIZE", 1)
    _, stepped = train_stacked_and_separately(net, x, y, FitConfig(SGDStep(0.1)))
    assert_close(stepped, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [nn.MaxPool1d, nn.MaxPool2d])
def test_relu_is_delayed_until_after_max_pooling(kind):
    shape = (4, 3, 8) if kind is nn.MaxPool1d else (4, 3, 8, 8)
    net = nn.Sequential(nn.ReLU(), kind(3, 2, 1)).double()
    program = build_program(net)
    assert len(program._delayed_relus) == 1
    x = torch.randn(shape, dtype=torch.float64).round(decimals=1).requires_grad_()  # with ties
    expected, actual = net(x), program.bind({}, 1)(x)
    assert torch.equal(actual, expected)
    weights = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (actual, expected)))


def test_relu_with_several_users_is_not_delayed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 1, 1)

        def forward(self, x):
            h = self.relu(x)
            return self.pool(h) + h

    program, x = build_program(Twice()), torch.randn(2, 3, 4, 4)
    assert not program._delayed_relus
    assert torch.equal(program.bind({}, 1)(x), F.max_pool2d(x.relu(), 3, 1, 1) + x.relu())


def test_signals_are_restored_for_layers_without_image_support():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.LayerNorm(6), nn.AdaptiveMaxPool1d(2), nn.BatchNorm1d(3))
    net, x = net.double(), torch.randn(4, 2, 8, dtype=torch.float64)
    program = build_program(net)
    state = {n: program.lay_out(n, v[None].clone()) for n, v in net.state_dict().items()}
    torch.testing.assert_close(program.bind(state, 1)(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("clients", "num_remaining"), [(1, 1), (3, 1), (4, 0), (9, 0)])
def test_lean_executor_gives_remaining_clients_all_threads(clients, num_remaining, small, monkeypatch):
    """With few clients, those that do not divide evenly by the threads train with two threads each."""
    ctx = build_context(small("fedbn", model="mlp"))
    users = [ctx.trainers[i % len(ctx.trainers)] for i in range(clients)]
    executor, num_threads = ClientExecutor("lean", 2), []
    jobs = [Train(ctx, u, ctx.initial_server_state(), None, Progress(1, 1)) for u in users]
    executor._start_run(ctx)
    real = executor._cohort.train
    monkeypatch.setattr(executor._cohort, "train", lambda *a: num_threads.append(torch.get_num_threads()) or real(*a))
    before = torch.get_num_threads()
    assert [r[0].user for r in executor.run(jobs)] == users
    assert sorted(num_threads) == [1] * (clients - num_remaining) + [2] * num_remaining
    assert torch.get_num_threads() == before


def test_fit_stack_needs_no_host_synchronization():
    """On the meta device every transfer raises, and only the final transfer of the losses does."""
    net = features().float().to("meta")
    state = dict(net.state_dict())
    x, y = torch.empty(20, 5, device="meta"), torch.empty(20, dtype=torch.long, device="meta")
    clients = [StackedClient(state, torch.arange(10), [6, 4], None, first=10 * i) for i in range(2)]
    with pytest.raises(NotImplementedError, match="meta") as caught:
        fit_clients(build_program(net), clients, x, y, FitConfig(SGDStep(0.1, 0.9, 0.1)), Classification())
    assert "total.tolist()" in str(next(e.statement for e in reversed(caught.traceback) if "fit.py" in str(e.path)))


@pytest.mark.parametrize("failing", [None, -1])
def test_keep_freed_memory_sets_options_of_glibc(failing, monkeypatch):
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return int(option != failing)

    libc = SimpleNamespace(mallopt=mallopt, gnu_get_libc_version=None)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: libc)
    assert keep_freed_memory() is (failing is None)
    # The numbers in malloc.h of M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD.
    assert calls == [(-4, 0), (-1, 2**31 - 1), (-2, 2**26)][: 3 if failing is None else 2]
    del libc.gnu_get_libc_version
    assert keep_freed_memory() is False


def test_collect_garbage_rarely_freezes_loaded_objects():
    keep_freed_memory()
    previous = gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(700)
    try:
        collect_garbage_rarely()
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold()[0] > 700
        assert gc.isenabled()
    finally:
        gc.set_threshold(*previous)


@pytest.mark.parametrize("transposed", [False, True])
def test_mkldnn_linear_matches_linear(transposed):
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=draw) for shape in ((6, 9), (6,), (4, 9)))
    weight = weight.T.contiguous().T if transposed else weight
    for bias_or_none in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if bias_or_none is None else bias.double())
        torch.testing.assert_close(mkldnn_linear(x, weight, bias_or_none).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mkldnn_linear(x.double(), weight.double(), None), F.linear(x.double(), weight.double()))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_torch_provides_mkldnn_linear_operator():
    out = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 2), torch.ones(3, 2), None, "none", [], "")
    assert out.tolist() == [[2.0, 2.0, 2.0]]
