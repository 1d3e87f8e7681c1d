"""Networks with LayerNorm, GroupNorm and others: which layers each strategy owns and replaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.federation.client import user_state
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context
from fedbn.nn.conversion import convert
from fedbn.nn.roles import Role, norm_layers, roles, uses_batch_statistics
from fedbn.norms.weight_norm import initialize
from fedbn.personalization.treatment import treatment
from fedbn.strategies.base import StatelessNorm, strategies, strategy
from fedbn.strategies.ownership import LOCAL, SEEDED, SHARED, Ownership
from tests.helpers import same

REMOVING = ("feature-norm", "fedwon", "nonorm", "weight-norm")
"""Strategies without any normalization of activations."""


class Hybrid(nn.Module):
    """A convolution with BN and GroupNorm, then two kinds of transformer layers, RMSNorm and instance normalization."""

    def __init__(self, shape=(1, 8, 8), classes=10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(4, 8)
        )
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 1)
        self.second = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True)
        self.rms = nn.RMSNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.instance(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.rms(self.second(self.encoder(x))).mean(1))


def hybrid(seed=0):
    """A hybrid network with scales, shifts and statistics that are not the initial ones, and inputs."""
    torch.manual_seed(seed)
    model = Hybrid()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    x = torch.randn(6, 1, 8, 8) * 3 + 1
    model(x)
    return model, x


def others(model):
    """State of the normalization layers without batch statistics."""
    layers = {p: m for p, m in norm_layers(model).items() if not uses_batch_statistics(m)}
    return {f"{path}.{name}": value for path, m in layers.items() for name, value in m.state_dict().items()}


@pytest.mark.parametrize("name", strategies())
def test_strategy_replaces_only_layers_with_batch_statistics(name):
    plain, x = hybrid()
    model = strategy(name).prepare_model(copy.deepcopy(plain))
    types = {path: type(m) for path, m in norm_layers(plain).items() if not uses_batch_statistics(m)}
    if name in REMOVING:
        assert not norm_layers(model)
    else:
        assert {path: type(m) for path, m in norm_layers(model).items() if path in types} == types
        assert same({k: v for k, v in others(model).items() if k in others(plain)}, others(plain))
    if issubclass(strategies()[name], StatelessNorm):
        assert not any(map(uses_batch_statistics, model.modules()))
    model.train()(x).sum().backward()
    # Without gradients, PyTorch's transformer layers may use a fused kernel that reads the layers' parameters.
    expected = model.eval()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", strategies())
def test_strategy_shares_scale_and_shift_of_other_norms(name):
    model = strategy(name).prepare_model(hybrid()[0])
    table = Ownership.of(model, strategy(name))
    assert all(table.roles[key] is Role.SAMPLE_AFFINE for key in others(model))
    assert {table.owner(key) for key in others(model)} <= {LOCAL if name == "local" else SHARED}


@pytest.mark.parametrize(("name", "owner"), [("fedbn", LOCAL), ("fedbn-seeded", SEEDED)])
def test_fedbn_retains_other_norms_on_request(name, owner):
    model = hybrid()[0]
    table = Ownership.of(model, strategy(f"{name}:norms=all"))
    assert {table.owner(key) for key in others(model)} == {owner}
    assert {table.owner(k) for k, role in roles(model).items() if role is Role.BODY} == {SHARED}


def test_fedbn_users_share_layer_norm(small, register_model):
    run = small("fedbn", model=register_model(Hybrid), rounds=1, clients_per_round=2)
    ctx, out = build_context(run), federate(run)
    first, second = (ctx.assemble(out.server.state, state) for state in out.client_states.values())
    differing = {ctx.ownership.roles[k] for k in first if not torch.equal(first[k], second[k])}
    assert differing == {Role.AFFINE, Role.STATISTICS, Role.COUNTER}  # users have different numbers of batches
    assert not torch.equal(first["rms.weight"], ctx.initial["rms.weight"])


def test_apfl_mixes_scale_and_shift_of_other_norms(small, register_model):
    run = small("local+apfl", model=register_model(Hybrid), rounds=1, eval_every=1, global_test=None)
    ctx = build_context(run)
    user, state = next(iter(federate(run).client_states.items()))
    served = user_state(ctx, user, {}, state)
    for key in ("rms.weight", "second.norm1.bias"):
        personal = state[f"method_state/{key}"]
        assert not torch.equal(personal, state[key])
        torch.testing.assert_close(served[key], (state[key] + personal) / 2)


def layer_norm(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, classes))


def group_norm(shape, classes):
    layers = nn.Conv2d(1, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, classes))


def norm_free(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))


def untracked(shape, classes):
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm, nn.ReLU(), nn.Linear(8, classes))


@pytest.mark.parametrize("make", [layer_norm, group_norm, norm_free, untracked])
def test_fedavg_trains_networks_without_statistics(small, register_model, make):
    text = register_model(make)
    names = ("fedavg", "params-only") + (("nonorm",) if make is norm_free else ())
    naive, *equal = (federate(small(name, model=text, rounds=1, clients_per_round=2)) for name in names)
    for other in equal:
        assert same(naive.server.state, other.server.state)
        assert naive.scores == other.scores
    ctx = build_context(small("fedavg", model=text))
    assert ctx.ownership.travels == list(ctx.initial)
    assert all(not torch.equal(v, ctx.initial[k]) for k, v in naive.server.state.items())


@pytest.mark.parametrize("make", [layer_norm, group_norm, norm_free])
@pytest.mark.parametrize("name", ["fedbn", "silobn", "global-pooled", "iabn", "hbn", "groupnorm", "instancenorm"])
def test_strategy_that_needs_batch_norm_suggests_fedavg(name, make):
    with pytest.raises(UserError, match=f"strategy '{name}' .* choose a model with BatchNorm.*FedAvg"):
        strategy(name).prepare_model(make((1, 8, 8), 10))


def test_convert_replaces_other_norms_only_without_batch_norm():
    mixed = convert(nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm1d(4)), "group", groups=4)
    assert [layer.num_groups for layer in mixed] == [2, 4]
    assert type(convert(nn.Sequential(nn.GroupNorm(2, 4)), "batch")[0]).__name__ == "AnyBatchNorm"


def test_strategies_inherit_eps_of_replaced_layers():
    for name in ("fbn", "hbn", "fedtan", "iabn", "ghost-bn"):
        assert strategy(name).prepare_model(nn.Sequential(nn.BatchNorm1d(3, eps=0.5)))[0].eps == 0.5


def test_weight_norm_initializes_units_of_linear_layers_on_the_last_axis():
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "weight-norm")
    x = torch.randn(50, 7, 3)
    initialize(net, x)
    out = net(x).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fedavg", "global-naive"),
        ("FedAvg", "global-naive"),
        ("bn", "global-naive"),
        ("gn:groups=4", "groupnorm:groups=4"),
        ("group", "groupnorm"),
        ("GroupNorm", "groupnorm"),
        ("ghost_bn:size=4", "ghost-bn:size=4"),
        ("BatchRenorm", "batch-renorm"),
        ("LN", "layernorm"),
        ("FedProx:mu=0.1", "global-naive+fedprox:mu=0.1"),
        ("scaffold", "global-naive+scaffold"),
        ("FedAvg+Ditto", "global-naive+ditto"),
    ],
)
def test_alias_has_the_identity_of_its_target(small, text, name):
    assert str(treatment(text)) == name
    assert small(text).id == small(name).id
