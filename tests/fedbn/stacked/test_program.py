"""The layouts and shortcuts of the stacked program: each computes what the plain model does."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clients.jobs import Train
from fedbn.federation.setup import build_context
from fedbn.stacked import fit
from fedbn.stacked.executors import ClientExecutor
from fedbn.stacked.fit import Descent, Trainee, fit_stack
from fedbn.stacked.layers import product
from fedbn.stacked.memory import collect_garbage_rarely, keep_freed_memory
from fedbn.stacked.program import build_program
from fedbn.strategies.base import Progress


def features(dropout=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, 3))
    return net.double()


def trained(net, x, y, how, clients=3, noise=False):
    """Clients trained in one stack, and each in a stack of its own."""
    rows = len(y) // clients
    state = {k: v.clone() for k, v in net.state_dict().items()}

    def trainee(i):
        draw = torch.Generator().manual_seed(i) if noise else None
        return Trainee(state, torch.arange(rows), [rows // 2, rows - rows // 2], draw, first=i * rows)

    program = build_program(net)
    alone = [fit_stack(program, [trainee(i)], x, y, how)[0] for i in range(clients)]
    return fit_stack(program, [trainee(i) for i in range(clients)], x, y, how), alone


def agree(a, b, **tolerance):
    for one, other in zip(a, b, strict=True):
        for key, value in other.state.items():
            torch.testing.assert_close(one.state[key], value, **tolerance)


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
        (features(), 4, False),  # positions, which nobody has flattened
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
def test_examples_lie_on_the_last_axis_only_where_there_are_no_positions(net, axes, expected):
    assert build_program(net).across(axes) is expected


@pytest.mark.parametrize("noise", [False, True])
def test_both_layouts_of_features_agree(noise):
    net = features(dropout=0.4 if noise else 0.0)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 3, (30,))
    together, alone = trained(net, x, y, Descent(0.1), noise=noise)  # alone, examples lie on the first axis
    agree(together, alone, rtol=1e-10, atol=1e-12)
    assert not torch.equal(alone[0].state["0.weight"], alone[1].state["0.weight"])  # each has rows of its own


@pytest.mark.parametrize("first", [True, False])
def test_a_large_linear_layer_steps_in_the_backward_pass(first, monkeypatch):
    torch.manual_seed(1)
    layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)]
    net = nn.Sequential(*layers if first else layers[1:]).double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
    together, expected = trained(net, x, y, Descent(0.1))
    monkeypatch.setattr(fit, "HEAVY", 1)
    used = []
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda *a, real=torch.Tensor.addmm_, **k: used.append(1) or real(*a, **k)
    )
    _, stepped = trained(net, x, y, Descent(0.1))
    assert len(used) == 3 * 2 * (1 + first)  # clients, steps, and layers with a bias
    agree(stepped, expected, rtol=1e-12, atol=1e-14)
    agree(together, expected, rtol=1e-12, atol=1e-14)
    used.clear()
    trained(net, x, y, Descent(0.1, momentum=0.9))  # the buffer needs the gradient
    assert not used


@pytest.mark.parametrize("kind", [nn.MaxPool1d, nn.MaxPool2d])
def test_a_relu_may_wait_for_the_pooling_behind_it(kind):
    shape = (4, 3, 8) if kind is nn.MaxPool1d else (4, 3, 8, 8)
    net = nn.Sequential(nn.ReLU(), kind(3, 2, 1)).double()
    program = build_program(net)
    assert len(program._late) == 1
    x = torch.randn(shape, dtype=torch.float64).round(decimals=1).requires_grad_()  # with ties
    expected, got = net(x), program.bind({}, 1)(x)
    assert torch.equal(got, expected)
    weights = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (got, expected)))


def test_a_relu_that_others_use_too_does_not_wait():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 1, 1)

        def forward(self, x):
            h = self.relu(x)
            return self.pool(h) + h

    program, x = build_program(Twice()), torch.randn(2, 3, 4, 4)
    assert not program._late
    assert torch.equal(program.bind({}, 1)(x), F.max_pool2d(x.relu(), 3, 1, 1) + x.relu())


def test_signals_are_signals_again_for_layers_that_tell_them_from_images():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.LayerNorm(6), nn.AdaptiveMaxPool1d(2), nn.BatchNorm1d(3))
    net, x = net.double(), torch.randn(4, 2, 8, dtype=torch.float64)
    program = build_program(net)
    state = {n: program.laid(n, v[None].clone()) for n, v in net.state_dict().items()}
    torch.testing.assert_close(program.bind(state, 1)(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("clients", "one_by_one"), [(1, 1), (3, 1), (4, 0), (9, 0)])
def test_clients_left_over_get_all_threads(clients, one_by_one, small, monkeypatch):
    """Few clients: those that do not divide evenly train with two threads each; many: nobody does."""
    ctx = build_context(small("fedbn", model="mlp"))
    users = [ctx.trainers[i % len(ctx.trainers)] for i in range(clients)]
    executors, seen = ClientExecutor("lean", 2), []
    jobs = [Train(ctx, u, ctx.start(), None, Progress(1, 1)) for u in users]
    executors._start_run(ctx)
    real = executors._cohort.train
    monkeypatch.setattr(executors._cohort, "train", lambda *a: seen.append(torch.get_num_threads()) or real(*a))
    before = torch.get_num_threads()
    assert [r[0].user for r in executors.run(jobs)] == users
    assert sorted(seen) == [1] * (clients - one_by_one) + [2] * one_by_one
    assert torch.get_num_threads() == before


def test_a_stack_needs_nothing_from_the_cpu_but_its_shuffles():
    """On the meta device any tensor that is made elsewhere, or looked at, would raise; only the losses are."""
    net = features().float().to("meta")
    state = dict(net.state_dict())
    x, y = torch.empty(20, 5, device="meta"), torch.empty(20, dtype=torch.long, device="meta")
    trainees = [Trainee(state, torch.arange(10), [6, 4], None, first=10 * i) for i in range(2)]
    with pytest.raises(NotImplementedError, match="meta") as caught:
        fit_stack(build_program(net), trainees, x, y, Descent(0.1, momentum=0.9, weight_decay=0.1))
    assert "total.tolist()" in str(next(e.statement for e in reversed(caught.traceback) if "fit.py" in str(e.path)))


def test_what_is_loaded_is_left_alone():
    keep_freed_memory()
    often = gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(700)
    try:
        collect_garbage_rarely()
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold()[0] > 700
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*often)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_large_weights_are_those_of_a_linear_layer(transposed):
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=draw) for shape in ((6, 9), (6,), (4, 9)))
    weight = weight.T.contiguous().T if transposed else weight
    for bias_or_none in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if bias_or_none is None else bias.double())
        torch.testing.assert_close(product(x, weight, bias_or_none).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(product(x.double(), weight.double(), None), F.linear(x.double(), weight.double()))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_this_torch_has_the_operator_that_makes_them_fast():
    assert torch.ops.mkldnn._linear_pointwise(torch.ones(1, 2), torch.ones(3, 2), None, "none", [], "").tolist() == [
        [2.0, 2.0, 2.0]
    ]
