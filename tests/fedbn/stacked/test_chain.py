"""Steps in closed form equal those of autograd, in double precision and client by client."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.roles import clone
from fedbn.stacked.chain import Chain, find_chain
from fedbn.stacked.fit import FitConfig, StackedClient, fit_clients
from fedbn.stacked.layers import Unstackable
from fedbn.stacked.program import build_program
from fedbn.stacked.steps import AdamStep, SGDStep
from fedbn.tasks.classification import Classification
from fedbn.tasks.multilabel import MultiLabel
from fedbn.tasks.regression import Regression
from tests.fedbn.stacked.programs import assert_close, with_random_entries

CLASSES = 5


class Block(nn.Module):
    """A linear layer and functions instead of modules."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.layer(F.relu(x.flatten(1)).relu())


NORMS = {
    "BN": lambda n: nn.BatchNorm1d(n),
    "options": lambda n: AnyBatchNorm(n, momentum=0.3, eps=0.1),
    "not affine": lambda n: nn.BatchNorm1d(n, affine=False),
    "not tracked": lambda n: nn.BatchNorm1d(n, track_running_stats=False),
    "evaluation": lambda n: nn.BatchNorm1d(n).eval(),
    "identity": lambda n: nn.Identity(),
}


def network(norm, widths, *, functional=False, frozen=()):
    """A network with these widths, without the parameters whose names end with one of ``frozen``."""
    layers = [nn.Flatten(), nn.BatchNorm1d(widths[0])]
    for inputs, outputs in itertools.pairwise(widths):
        linear = Block(inputs, outputs) if functional else nn.Linear(inputs, outputs, bias=outputs != 3)
        layers += [linear, NORMS[norm](outputs), nn.ReLU(inplace=True), nn.Dropout(0.3)]
    net = nn.Sequential(*layers, nn.Dropout(0.0), nn.Linear(widths[-1], CLASSES)).double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith(tuple(frozen)))
    return net


def bind(net, models, lr):
    """A chain of all models, its entries, and whether steps are applied."""
    program = build_program(net)
    names = net.state_dict().keys()
    tensors = {n: program.lay_out(n, torch.stack([m.state_dict()[n] for m in models])).clone() for n in names}
    noise = [torch.Generator().manual_seed(i) for i in range(len(models))]
    chain = Chain(find_chain(program), tensors, program.trained, noise, len(models), lr)
    return program, tensors, chain


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lr", [0.3, None, "each"])
def test_steps_match_autograd_of_each_client(norm, lr):
    assert_steps_match(network(norm, (4, 6, 3)), 5, lr)


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.booleans(),
    st.sets(st.sampled_from(["0.weight", "1.weight", "2.weight", "layer.weight", "bias", ".6.weight"])),
    st.integers(2, 40),
    st.sampled_from([0.3, None]),
)
def test_steps_match_for_all_shapes_and_frozen_parameters(widths, functional, frozen, batch, lr):
    assert_steps_match(network("BN", widths, functional=functional, frozen=frozen), batch, lr)


def test_dropout_of_everything_matches_autograd():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    assert_steps_match(net, 4, 0.3)


def assert_steps_match(net, batch, lr):
    """Two steps of three clients in a chain equal those of each client with autograd."""
    torch.manual_seed(0)
    models = [with_random_entries(net) for _ in range(3)]
    lrs = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    program, tensors, chain = bind(net, models, lrs if lr == "each" else lr)
    masks = [torch.Generator().manual_seed(i).get_state() for i in range(3)]
    width = next(p for n, p in net.named_parameters() if p.dim() == 2).shape[1]
    for _ in range(2):
        x, y = torch.randn(3, batch, width, dtype=torch.float64), torch.randint(0, CLASSES - 1, (3, batch))
        losses = chain.step(x.clone().mT, y, Classification())
        gradients = []
        for i, model in enumerate(models):
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.set_rng_state(masks[i])
            loss = F.cross_entropy(model(x[i].clone()), y[i])
            masks[i] = torch.get_rng_state()
            assert_close(losses[i], loss.detach() * batch)
            gradients.append(torch.autograd.grad(loss, trained))
            if lr is not None:
                rate = lrs[i] if lr == "each" else lr
                torch._foreach_sub_([p.data for p in trained], [g * rate for g in gradients[i]])
        if lr is None:
            for n, *own in zip(program.trained, *gradients, strict=True):
                assert_close(chain.gradients[n], program.lay_out(n, torch.stack(own)))
        for n, value in tensors.items():
            assert_close(value, program.lay_out(n, torch.stack([m.state_dict()[n] for m in models])))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.other(x + self.layer(x))


class Repeated(Residual):
    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


class Early(Residual):
    def forward(self, x):
        hidden = self.layer(x)
        self.other(hidden)
        return hidden


class Own(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize(
    "net",
    [
        *(Residual(), Repeated(), Early(), nn.Sequential(nn.Linear(4, 4), Own())),
        *(nn.Sequential(weight_norm(nn.Linear(4, 4))), nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
        *(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(4, 3)),),
    ],
)
def test_other_models_are_no_chains(net):
    assert find_chain(build_program(net)) is None


def test_cumulative_statistics_have_no_stacked_steps():
    with pytest.raises(Unstackable, match="cumulatively"):
        build_program(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)))


def test_batch_of_one_row_is_an_error():
    net = nn.Sequential(nn.BatchNorm1d(4)).double()
    with pytest.raises(ValueError, match="more than one row"):
        bind(net, [net, net], 0.1)[2].step(torch.zeros(2, 4, 1).double(), torch.zeros(2, 1).long(), Classification())


@dataclass(frozen=True)
class Doubled(Classification):
    def losses(self, outputs, y):
        return 2 * super().losses(outputs, y)


TASKS = {
    "cross-entropy": Classification(),
    "smoothing": Classification(smoothing=0.1),
    "weights": Classification(weights=(1.0, 2.0, 0.5)),
    "subclass": Doubled(),
    "multilabel": MultiLabel(),
    "regression": Regression(center=(0.0,) * 3, scale=(1.0,) * 3),
}


@pytest.mark.parametrize("name", TASKS)
def test_stacked_gradients_match_autograd(name):
    task, outputs = TASKS[name], 100 * torch.randn(2, 3, 6, dtype=torch.float64)
    real = name in ("multilabel", "regression")
    y = torch.randint(0, 2, (2, 6, 3)).double() if real else torch.randint(0, 3, (2, 6))
    losses, gradient = task.stacked_gradients(outputs.clone(), y)
    leaf = outputs.clone().requires_grad_()
    expected = torch.stack([task.losses(part.T, own) for part, own in zip(leaf, y, strict=True)])
    assert_close(losses, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def halve(model):
    for parameter in model.parameters():
        parameter.grad /= 2


CONFIGS = {
    "sgd": (FitConfig(SGDStep(0.1)), True),
    "momentum": (FitConfig(SGDStep(0.1, 0.9, 0.1)), True),
    "adam": (FitConfig(AdamStep(0.1, (0.9, 0.999), 1e-3, 0.1, decoupled=False)), True),
    "proximal": (FitConfig(SGDStep(0.1), mu=0.5, proximal=frozenset({"0.weight"})), True),
    "clipping": (FitConfig(SGDStep(0.1), max_grad_norm=0.1), True),
    "hook": (FitConfig(SGDStep(0.1), hook=halve), True),
    "bfloat16": (FitConfig(SGDStep(0.1), precision="bfloat16"), False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_chains_train_as_each_client_by_itself(name, monkeypatch):
    """A stack of one client uses autograd; the other three have unequal numbers of steps."""
    config, closed = CONFIGS[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, y = torch.randn(36, 5, dtype=torch.float64), torch.randint(0, 3, (36,))
    program, state, sizes = build_program(net), clone(net.state_dict()), [[5, 5, 2], [2, 5, 5], [5, 5, 2]]
    taken, step = [], Chain.step

    def client(i):
        model = copy.deepcopy(net) if config.hook else None
        draw = torch.Generator().manual_seed(i)
        return StackedClient(state, torch.arange(12), sizes[i], draw, first=12 * i, model=model)

    monkeypatch.setattr(Chain, "step", lambda *args: taken.append(1) or step(*args))
    expected = [fit_clients(program, [client(i)], x, y, config, Classification())[0] for i in range(3)]
    assert not taken
    actual = fit_clients(program, [client(i) for i in range(3)], x, y, config, Classification())
    assert bool(taken) is closed
    if closed:
        for a, b in zip(actual, expected, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-6)
            assert_close(a.state, b.state)
            assert_close(a.optimizer_state, b.optimizer_state)
