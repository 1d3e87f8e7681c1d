"""Networks of users as plain networks: the same values and training, without wrappers and hooks."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from fedbn.nn.plain import copy_model, fixed_weight, hook_names, plain, with_hook_names, without_hook_names
from tests.fedbn.helpers import rejects

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def network(normalize):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    normalize(net)
    return net


def old_weight_norm(net):
    weight_norm(net[0])
    weight_norm(net[4], dim=None)


def old_spectral_norm(net):
    spectral_norm(net[0], n_power_iterations=2)
    spectral_norm(net[4], dim=1)


def new_spectral_norm(net):
    parametrizations.spectral_norm(net[0])


HOOKS = {"weight": old_weight_norm, "spectral": old_spectral_norm, "parametrized": new_spectral_norm}


def train(net, steps=4):
    x = torch.randn(steps, 6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for batch in x:
        optimizer.zero_grad()
        net.train()(batch).square().mean().backward()
        optimizer.step()
    return net.eval()(x[0])


@pytest.mark.parametrize("kind", HOOKS)
def test_plain_trains_like_hooks(kind):
    raw, net = network(HOOKS[kind]), plain(network(HOOKS[kind]))
    assert torch.equal(train(raw), train(net))
    assert torch.equal(train(copy.deepcopy(net)), train(net))


@pytest.mark.parametrize("kind", HOOKS)
def test_state_of_plain_network_loads_into_network_with_hooks(kind):
    raw, net = network(HOOKS[kind]), plain(network(HOOKS[kind]))
    expected = train(net)
    train(raw, steps=1)
    state = with_hook_names(net, net.state_dict())
    raw.load_state_dict(state)
    x = torch.randn(4, 6, 1, 4, 4, generator=torch.Generator().manual_seed(1))[0]
    assert torch.equal(raw.eval()(x), expected)
    assert list(without_hook_names(net, state)) == list(net.state_dict())
    assert len(hook_names(net)) == {"weight": 4, "spectral": 6, "parametrized": 0}[kind]


def test_plain_keeps_frozen_weights():
    net = plain(network(lambda net: (spectral_norm(net[0]), net.requires_grad_(False))))
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kind", ["spectral", "parametrized"])
def test_loaded_spectral_vectors_have_length_one(kind):
    net = plain(network(HOOKS[kind]))
    expected = train(net)
    halved = {k: v / 2 if k.endswith(("._u", "._v")) else v for k, v in net.state_dict().items()}
    net.load_state_dict(halved)
    x = torch.randn(4, 6, 1, 4, 4, generator=torch.Generator().manual_seed(1))[0]
    torch.testing.assert_close(net.eval()(x), expected)


@pytest.mark.slow
def test_plain_unwraps_compiled_and_parallel_modules():
    net = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)), torch.compile(nn.BatchNorm1d(2)))
    net.compile()
    unwrapped = plain(nn.DataParallel(torch.compile(net)))
    assert [type(m) for m in unwrapped] == [nn.Linear, nn.BatchNorm1d]
    assert unwrapped is net
    assert net._compiled_call_impl is None
    patched = nn.Linear(2, 2)
    patched.forward = torch.compile(patched.forward)
    assert "forward" not in vars(plain(patched))


def test_plain_refuses_torchscript():
    scripted = torch.jit.script(nn.Linear(2, 2))
    rejects("it is compiled by TorchScript.*return the torch.nn.Module", plain, scripted)
    rejects("module '1' is compiled by TorchScript", plain, nn.Sequential(nn.ReLU(), scripted))


def test_fixed_weight_keeps_the_function():
    for kind in HOOKS.values():
        net = plain(network(kind))
        expected = train(net)
        for layer in list(net.modules()):
            fixed_weight(layer)
        x = torch.randn(4, 6, 1, 4, 4, generator=torch.Generator().manual_seed(1))[0]
        torch.testing.assert_close(net(x), expected)
        assert not any(parametrize.is_parametrized(m) for m in net.modules())


def test_copy_model_copies_captured_activations_and_generators():
    net = nn.Sequential(nn.Linear(2, 2))
    net.generator = torch.Generator().manual_seed(3)
    net.captured = {"last": [net(torch.ones(1, 2))]}
    copied = copy_model(net)
    assert torch.equal(copied.captured["last"][0], net.captured["last"][0])
    assert copied.captured["last"][0].grad_fn is None
    assert torch.equal(torch.rand(3, generator=copied.generator), torch.rand(3, generator=net.generator))
    net.lock = threading.Lock()
    rejects("Sequential cannot be copied.*lock", copy_model, net)
