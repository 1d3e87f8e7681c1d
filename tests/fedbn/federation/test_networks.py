"""Runs of unusual networks: layers that do not run, chosen heads, private layers, and networks that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbn.federation.client import client_round
from fedbn.federation.cold_start import cold_starts, summarize
from fedbn.federation.loop import federate
from fedbn.federation.setup import build_context, check_device
from fedbn.nn.roles import Role
from fedbn.strategies.base import Progress
from fedbn.strategies.ownership import LOCAL
from tests.fedbn.helpers import rejects
from tests.helpers import same


@pytest.fixture(autouse=True)
def forget_models():
    """Registered models share one name, so that contexts of other tests must not be found."""
    build_context.cache_clear()
    yield
    build_context.cache_clear()


class Net(nn.Module):
    """A CNN for images ``[1, 8, 8]`` with layers that subclasses use or do not use."""

    def __init__(self, shape=(1, 8, 8), classes=10):
        super().__init__()
        self.fc, self.conv, self.norm = nn.Linear(4, classes), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.auxiliary = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, classes))

    def features(self, x):
        return F.relu(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x):
        h = self.features(x)
        return self.fc(h) + self.auxiliary(h) if self.training else self.fc(h)


class Plain(Net):
    """The network without the auxiliary head."""

    def __init__(self, shape=(1, 8, 8), classes=10):
        super().__init__(shape, classes)
        del self.auxiliary

    def forward(self, x):
        return self.fc(self.features(x))


class Unused(Net):
    def forward(self, x):
        return self.fc(self.features(x))


def scores(run):
    return federate(run).scores


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("rule", ["population", slow("")])
@pytest.mark.parametrize("strategy", ["global-pooled", *map(slow, ("fedap", "static-bn", "atp"))])
def test_layers_that_do_not_run_change_nothing(strategy, rule, small, register_model):
    """A layer that is registered last and never runs changes neither training nor any column."""
    if rule and strategy == "fedap":
        pytest.skip("fedap sends no statistics")
    found = []
    for make in (Unused, Plain):
        run = small(strategy, model=register_model(make), rounds=1)
        found.append(scores(replace(run, rule=rule)))
        build_context.cache_clear()
    assert found[0] == found[1]


def test_layers_that_run_in_training_only_have_scores(small, register_model):
    run = small("global-pooled", model=register_model(Net), rounds=1)
    columns = {s.column for found in scores(run).values() for s in found}
    assert {"aggregated", "recalibrated", "online", "nearest", "prior"} <= columns
    ctx = build_context(run)
    statistics = {k: v for k, v in ctx.initial.items() if ctx.ownership.roles[k] is Role.STATISTICS}
    starts = cold_starts(
        ctx, ctx.initial, summarize(ctx, {0: statistics, 1: statistics}), ctx.population.users[0].train.x
    )
    assert all(torch.equal(starts["prior"][k], v) for k, v in statistics.items() if k.startswith("auxiliary"))
    assert [n for n in ctx.notices if "ambiguous head" in n]


def test_head_option_sets_the_roles_and_the_identity(small, register_model):
    run = small("fedbn+fedper", model=register_model(Plain))
    chosen = replace(run, head="conv, fc").resolved()
    assert chosen.head == "conv,fc"
    assert chosen.id != run.id
    local = [set(build_context(r).ownership.keys(LOCAL)) for r in (run, chosen)]
    assert local[1] - local[0] == {"conv.weight", "conv.bias"}
    rejects("unknown layer for head 'cnv'. Did you mean 'conv'", build_context, replace(run, head="cnv"))


def test_private_layers_stay_local_for_every_strategy(small, register_model):
    run = replace(small("global-naive", model=register_model(Plain)), private="norm,fc").resolved()
    ctx = build_context(run)
    private = {"fc.weight", "fc.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert ctx.ownership.private == private
    update, client_state = client_round(ctx, 0, ctx.initial_server_state(), None, Progress(1, 2))
    assert set(update.state) == {"conv.weight", "conv.bias"}
    assert private <= set(client_state)
    rows = {row["role"]: row for row in ctx.ownership.rows()}
    assert rows["private"]["owner"] == "local"
    assert rows["private"]["bytes_up"] == 0
    assert not ctx.ownership.shares(Role.HEAD)
    # As with FedPer and FedBN together, if these are the private layers.
    other = build_context(small("fedbn+fedper", model=register_model(Plain)))
    crossed, crossed_state = client_round(other, 0, other.initial_server_state(), None, Progress(1, 2))
    assert same(update.state, crossed.state)
    assert same(client_state, crossed_state)
    rejects("unknown layer for private 'fd'. Did you mean 'fc'", build_context, replace(run, private="fd"))


class Growing(Plain):
    def __init__(self, shape=(1, 8, 8), classes=10):
        super().__init__(shape, classes)
        self.register_buffer("memory", torch.zeros(0, 4))

    def forward(self, x):
        h = self.features(x)
        if self.training:
            self.memory = torch.cat([self.memory, h.detach()])
        return self.fc(h)


class TiedHead(Plain):
    def __init__(self, shape=(1, 8, 8), classes=10):
        super().__init__(shape, classes)
        self.encode = nn.Linear(4, classes)
        self.fc.weight = self.encode.weight

    def forward(self, x):
        h = self.features(x)
        return self.fc(h + self.encode(h) @ self.encode.weight)


class Extra(Plain):
    def get_extra_state(self):
        return {}

    def set_extra_state(self, state):
        pass


class Failing(Plain):
    def forward(self, x):
        assert x.shape[1] == 3, "needs RGB"


class Collapsing(Plain):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


REFUSED = {
    "growing buffer": (Growing, r"entry 'memory' of the model changes in a forward pass from \[0, 4\] to \[4, 4\]"),
    "extra state": (Extra, "state entry '_extra_state' of Extra is not a parameter or buffer"),
    "any error": (
        Failing,
        r"does not take examples of shape \[1, 8, 8\] \(AssertionError: needs RGB\): choose a model",
    ),
    "one row": (Collapsing, r"outputs of shape \[1, 10\] for a batch of 4 and 10 classes"),
    "frozen": (lambda: Plain().requires_grad_(False), "Plain has no trainable parameters"),
    "precision": (lambda: Plain().double(), r"does not take examples of shape \[1, 8, 8\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_networks_are_refused_before_training(name, small, register_model):
    make, message = REFUSED[name]
    rejects(message, build_context, small(model=register_model(make)))


def test_tied_entries_have_one_owner(small, register_model):
    run = small("fedbn+fedper", model=register_model(TiedHead))
    ctx = build_context(run)
    assert {ctx.ownership.owner(k) for k in ("fc.weight", "encode.weight")} == {LOCAL}
    assert ["also those of" in n for n in ctx.notices if "ambiguous head" in n] == [True]
    message = r"different owners under fedbn\+fedper: fc.weight \(local\), encode.weight \(shared\)"
    rejects(message, build_context, replace(run, head="fc"))


@pytest.mark.parametrize("device", ["cuda:99", "mps:9", "nonsense", "meta", ""])
def test_unavailable_devices_are_refused(device, small):
    rejects("device .* cannot be used here .*: choose one of cpu", check_device, device)
    if device:
        rejects("cannot be used here", build_context, replace(small(), device=device))


def only_head(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def frozen_head(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, classes).requires_grad_(False))


@pytest.mark.parametrize(
    ("method", "make", "part"),
    [("fedbabu", only_head, "outside"), ("fedrep", only_head, "outside"), ("fedrep", frozen_head, "in")],
)
def test_methods_that_train_parts_need_trainable_parts(small, register_model, method, make, part):
    message = (
        f"{method} trains the head and the other layers .*, but the model has no trainable parameters {part} its head"
    )
    rejects(message, build_context, small(f"global-naive+{method}", model=register_model(make)))
    build_context.cache_clear()
    build_context(small("global-naive+fedper", model=register_model(make)))
