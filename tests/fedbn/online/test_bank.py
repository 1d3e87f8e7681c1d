from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.models.resnet20 import ResNet20
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.roles import clone, statistics_layers
from fedbn.online import LayerPrior, personalize
from fedbn.online.layer import row_moments
from fedbn.online.rules.base import rules
from fedbn.statistics.recalibration import recalibrate
from tests.helpers import mostly_slow, same

EXCLUDES_CURRENT = [n for n, r in rules().items() if not r.includes_current and not r.classwise and not r.requires]


def randomized(net, *shape):
    """The net in evaluation mode with random weights, scales and statistics, and random inputs."""
    torch.manual_seed(0)
    for m in net.modules():
        if hasattr(m, "running_mean") and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            if m.weight is not None:
                nn.init.uniform_(m.weight, -2, 2)
                nn.init.normal_(m.bias)
    return net.eval().requires_grad_(False), torch.randn(*shape) * 2 + 1


class Branched(nn.Module):
    """Nested BN layers of all kinds: one shared by two paths, one without affine parameters, one unused."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4, affine=False), nn.ReLU())
        self.inner = nn.ModuleDict({"conv2": nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6, eps=1e-3))})
        self.shared = nn.BatchNorm1d(6)
        self.unused = nn.BatchNorm1d(5)
        self.any = AnyBatchNorm(6)
        self.group = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.inner["conv2"](self.conv3(x).mean(2)).flatten(2)
        x = self.group(self.shared(x) + self.shared(x.flip(2) * 2))
        return self.head(self.any(x.mean(2)))


def linear_net():
    norms = nn.BatchNorm1d(8), nn.BatchNorm1d(6)
    return nn.Sequential(nn.Linear(5, 8), norms[0], nn.ReLU(), nn.Linear(8, 6), norms[1], nn.Linear(6, 3))


NETS = {
    "har": lambda: randomized(HarCNN((3, 32), 4), 9, 3, 32),
    "resnet": lambda: randomized(ResNet20((3, 16, 16), 5), 6, 3, 16, 16),
    "branched": lambda: randomized(Branched(), 7, 1, 4, 6, 5),
    "linear": lambda: randomized(linear_net(), 8, 5),
    "double": lambda: (lambda n, x: (n.double(), x.double()))(*randomized(linear_net(), 8, 5)),
    "half": lambda: (lambda n, x: (n.bfloat16(), x.bfloat16()))(*randomized(linear_net(), 8, 5)),
}


def personalized(name, *args, **options):
    """A network, inputs, and the personalized network."""
    model, x = NETS[name]()
    return model, x, personalize(model, *(args or ("pseudo",)), **options)


def predict_and_commit(net, x, user, **options):
    net.predict(x, user=user)
    net.commit(**options)


# ---------------------------------------------------------------- new users and other users


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", EXCLUDES_CURRENT)
def test_predict_of_new_user_is_bit_equal_to_source(net, name):
    model, x = NETS[net]()
    before = clone(model.state_dict())
    adapted = personalize(model, name)
    expected = model(x)
    assert torch.equal(adapted.predict(x, user=list(range(len(x)))), expected)
    adapted(x, user=["known"] * len(x))
    assert torch.equal(adapted.predict(x, user="unknown"), expected), "other users were updated, the new user was not"
    adapted.reset("known")
    assert torch.equal(adapted.predict(x, user="known"), expected), "after a reset"
    assert adapted.users == ["known"], "predict must not add users"
    assert same(before, model.state_dict()), "the source model must not change"


@pytest.mark.parametrize("net", ["har", "branched", "linear"])
@pytest.mark.parametrize("name", ["pseudo", "dabn", "tbn", "unmix-tns", "pseudo:guard=true"])
def test_rows_of_other_users_have_no_influence(net, name):
    model, x = NETS[net]()
    users = [i % 3 for i in range(len(x))]
    is_ann = torch.tensor([u == 0 for u in users])
    changed = torch.where(is_ann.view(-1, *[1] * (x.dim() - 1)), x, x * 3 - 50)
    one, other = personalize(model, name), personalize(model, name)
    for _ in range(3):
        a, b = one(x, user=users), other(changed, user=users)
    assert torch.equal(a[is_ann], b[is_ann])
    assert not torch.equal(a[~is_ann], b[~is_ann])


@pytest.mark.parametrize("net", mostly_slow(["har", "branched", "linear"], "branched"))
@pytest.mark.parametrize("name", ["pseudo:n0=2", "ema:rate=0.3", "dabn", "dua", "tbn", "membn:size=3", "tema"])
def test_batch_of_users_matches_single_users(net, name):
    model, x = (value.double() for value in NETS[net]())
    batched, single = personalize(model, name), personalize(model, name)
    for step in range(3):
        batch = x * (1 + step) + torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1))
        out = batched(batch, user=list(range(len(x))))
        expected = torch.cat([single(batch[i : i + 1], user=i) for i in range(len(x))])
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_export_matches_predict():
    model, x, adapted = personalized("har", "pseudo:n0=3")
    adapted(x, user="ann")
    plain = adapted.export("ann")
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(plain(x), adapted.predict(x, user="ann"), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain(x), model(x))


def test_first_layer_has_exact_moments_of_user():
    model, _ = NETS["linear"]()
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2
    adapted = personalize(model, "cumulative")
    users = ["ann" if i % 3 else "bob" for i in range(40)]
    for rows in torch.arange(40).split(7):
        adapted(x[rows], user=[users[i] for i in rows.tolist()])
    for name in ("ann", "bob"):
        inputs = model[0](x[[u == name for u in users]])
        mean, var = adapted.statistics(name)["1"]
        torch.testing.assert_close(mean, inputs.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, inputs.var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_shared_layer_learns_from_both_calls():
    model, x = NETS["branched"]()
    inputs = []
    adapted = personalize(model, "cumulative")
    adapted.model.shared.register_forward_pre_hook(lambda _m, a: inputs.append(a[0]))
    adapted(x[:1], user=1)
    both = torch.cat([s.transpose(0, 1).flatten(1) for s in inputs[:2]], 1)
    mean, var = adapted.statistics(1)["shared"]
    torch.testing.assert_close(mean, both.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, both.var(1, correction=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(adapted.statistics(1)["unused"][0], model.unused.running_mean)


@given(st.floats(-1e3, 1e3), st.sampled_from([(2, 3), (2, 3, 5), (1, 3, 4, 2), (2, 3, 2, 2, 3)]), st.integers(0, 9))
@settings(max_examples=40)
def test_row_moments_are_exact_far_from_zero(offset, shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset
    mean, var = row_moments(x, torch.full((3,), float(round(offset))))
    flat = x.double().view(*x.shape[:2], -1)
    torch.testing.assert_close(mean.double(), flat.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), flat.var(2, correction=0), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- duplicates


def test_sequential_duplicates_match_single_rows():
    model, x = NETS["har"]()
    users = ["a", "b", "a", "a", "c", "b", "c", "a", "d"]
    adapted = personalize(model, "pseudo:n0=2", duplicates="sequential")
    slow = personalize(model, "pseudo:n0=2")
    out = adapted(x, user=users)
    one_by_one = torch.cat([slow(x[i : i + 1], user=u) for i, u in enumerate(users)])
    torch.testing.assert_close(out, one_by_one, rtol=1e-5, atol=1e-6)
    for u in "abcd":
        assert adapted.state(u).n == slow.state(u).n == users.count(u)


def test_duplicates_are_sequential_or_merged_updates():
    model, x = NETS["linear"]()
    sequential = personalize(model, "ema:rate=0.5", duplicates="sequential")
    merged = personalize(model, "ema:rate=0.5", duplicates="merge")
    for net in (sequential, merged):
        predict_and_commit(net, x[:2], "ann")
    a, b = model[0](x[:2])
    start = model[1].running_mean
    torch.testing.assert_close(sequential.statistics("ann")["1"][0], 0.25 * start + 0.25 * a + 0.5 * b)
    torch.testing.assert_close(merged.statistics("ann")["1"][0], 0.5 * start + 0.25 * a + 0.25 * b)
    assert (sequential.report("ann")["updates"], merged.report("ann")["updates"]) == (2, 1)


def test_unknown_users_of_one_batch_stay_separate():
    _, x, net = personalized("har", "tbn")
    expected = torch.cat([net.predict(x[i : i + 1], user="z") for i in range(2)])
    torch.testing.assert_close(net.predict(x[:2], user=["x", "y"]), expected)


# ---------------------------------------------------------------- predict, commit, weights


def test_predict_never_updates_and_frozen_blocks_commit():
    _, x, net = personalized("har")
    net(x, user="ann")
    state = net.state("ann").to_bytes()
    net.predict(x * 5, user="ann")
    with net.frozen():
        net(x * 5, user="ann")
        predict_and_commit(net, x, "ann")
        with net.frozen():
            net(x, user="bob")
        net(x, user="bob")
    assert net.state("ann").to_bytes() == state
    assert net.users == ["ann"]
    net(x, user="ann")
    assert net.state("ann").to_bytes() != state


def test_commit_uses_records_of_last_predict():
    model, x = NETS["har"]()
    one, two = personalize(model, "pseudo"), personalize(model, "pseudo")
    one(x, user="ann")
    two.predict(x, user="ann")
    two.train()
    two.model(x * 9)
    two.commit()
    means = ({path: m.mean for path, m in net.state("ann").layers.items()} for net in (one, two))
    assert same(*means)


def test_commit_weights_count_as_windows():
    model, x = NETS["linear"]()
    one, two = personalize(model, "pseudo:n0=1"), personalize(model, "pseudo:n0=1")
    predict_and_commit(one, x[:3], "ann", weight=torch.tensor([2.0, 0.0, 1.0]))
    predict_and_commit(two, x[[0, 0, 2]], "ann")
    torch.testing.assert_close(one.statistics("ann")["1"], two.statistics("ann")["1"])
    predict_and_commit(two, x[:2], "cid", posterior=torch.eye(3)[:2], weight=torch.tensor([2.0, 0.5]))
    assert two.state("cid").classes.tolist() == [2, 0.5, 0]
    predict_and_commit(one, x[:1], "bob", weight=torch.zeros(1))
    assert (one.report("bob")["learned"], one.report("bob")["offered"]) == (0, 1)
    assert torch.equal(one.predict(x, user="bob"), one.predict(x, user="unknown"))


def test_capacity_evicts_least_recently_used_and_reloads():
    model, x = NETS["har"]()
    store = {}
    small = personalize(model, "pseudo:n0=2", capacity=2, store=store)
    large = personalize(model, "pseudo:n0=2")
    order = ["a", "b", "a", "c", "a", "b", "d", "c", "a"]
    for i, u in enumerate(order):
        assert torch.equal(small(x[i : i + 1], user=u), large(x[i : i + 1], user=u)), (i, u)
        if i == 3:
            assert set(store) == {"b"}, "a was used after b"
    assert small.users == large.users == list("abcd")
    reopened = personalize(model, "pseudo:n0=2", capacity=2, store=store)
    small.flush()
    assert torch.equal(reopened.predict(x[:2], user=["a", "b"]), large.predict(x[:2], user=["a", "b"]))
    reopened.forget("a")
    assert reopened.users == list("bcd")


def test_snapshot_and_restore_are_exact():
    _, x, net = personalized("har", "pseudo:n0=2:diversity=1", capacity=2)
    net(x[:2], user=["a", "b"])
    net(x[:1], user=["c"])
    before = [net.state(u).to_bytes() for u in "abc"]
    snap = net.snapshot()
    net(x[:2], user=["a", "d"])
    net(x[:1], user="e")
    net.reset("b")
    net.restore(snap)
    assert net.users == list("abc")
    assert [net.state(u).to_bytes() for u in "abc"] == before


def test_restore_discards_the_last_prediction():
    _, x, net = personalized("har")
    net(x[:2], user=["a", "b"])
    snap, state = net.snapshot(), net.state("a").to_bytes()
    net.predict(x[:1] * 3, user="a")
    net.restore(snap)
    with pytest.raises(UserError, match="nothing to commit"):
        net.commit()
    assert net.state("a").to_bytes() == state


def test_layer_that_did_not_run_keeps_statistics():
    class Skipping(Branched):
        skips = False

        def forward(self, x):
            x = self.inner["conv2"](self.conv3(x).mean(2)).flatten(2)
            return self.head((x if self.skips else self.any(x)).mean(2))

    model, x = randomized(Skipping(), 5, 1, 4, 6, 5)
    net = personalize(model, "ema:rate=0.5")
    before = net.statistics("ann")
    net(x, user="ann")
    ran = net.statistics("ann")
    net.model.skips = True
    net(x * 3, user="ann")
    after = net.statistics("ann")
    for path in ("any", "shared", "unused"):
        assert all(torch.equal(a, b) for a, b in zip(after[path], ran[path], strict=True)), path
    assert all(torch.equal(a, b) for a, b in zip(after["unused"], before["unused"], strict=True))
    for a, b in zip(ran["any"], before["any"], strict=True):
        assert not torch.isclose(a, b).any()
    for a, b in zip(after["conv3.1"], ran["conv3.1"], strict=True):
        assert not torch.isclose(a, b).any()


def test_predict_is_thread_safe():
    model, x = NETS["har"]()
    nets = [personalize(model, "pseudo") for _ in range(2)]
    nets[1](x * 4, user="ann")
    expected = [n.predict(x, user="ann") for n in nets]

    def is_same(i):
        return all(torch.equal(nets[i].predict(x, user="ann"), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(is_same, range(2)))


def test_personalized_supports_deepcopy_and_double():
    _, x, net = personalized("linear")
    net(x, user="ann")
    copied = copy.deepcopy(net)
    copied(x * 3, user="ann")
    assert net.state("ann").n == 8
    out = copied.double().predict(x.double(), user="ann")
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, copied.export("ann")(x.double()))


# ---------------------------------------------------------------- calibration


def test_calibrate_without_prior_is_adabn():
    model, x = NETS["har"]()
    model = model.double()
    x = torch.randn(600, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1
    adapted = personalize(model, "adabn")
    adapted.calibrate(x, user="ann", n0=0)
    offline = recalibrate(copy.deepcopy(model), x)
    for path, (mean, var) in adapted.statistics("ann").items():
        layer = offline.get_submodule(path)
        torch.testing.assert_close(mean, layer.running_mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(var, layer.running_var, rtol=2e-3, atol=2e-3)  # stored as n/(n-1) of it


def test_calibrate_by_layer_with_prior_and_equal_classes():
    model, x = NETS["linear"]()
    y = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2])
    net = personalize(model, "pseudo:n0=4")
    net.calibrate(x, user="ann", labels=y, n0=2.0)
    weight = torch.tensor([1 / 5] * 5 + [1.0] + [1 / 2] * 2) / 3
    inner = copy.deepcopy(model)
    for i in (1, 4):
        h = inner[:i](x)
        mean = (weight[:, None] * h).sum(0)
        var = (weight[:, None] * (h - mean) ** 2).sum(0)
        m0, v0 = inner[i].running_mean.clone(), inner[i].running_var.clone()
        inner[i].running_mean.copy_(0.2 * m0 + 0.8 * mean)
        inner[i].running_var.copy_(0.2 * v0 + 0.8 * var + 0.16 * (mean - m0) ** 2)
    torch.testing.assert_close(net.predict(x, user="ann"), inner(x), rtol=1e-5, atol=1e-5)


def test_calibrate_freezes_or_adapts_until_reset():
    model, x, net = personalized("har", "pseudo:n0=4")
    net.calibrate(x, user="ann", then="freeze")
    net.calibrate(x, user="bob", then="adapt")
    assert torch.equal(net.predict(x, user="ann"), net.predict(x, user="bob"))
    assert not torch.allclose(net.predict(x, user="ann"), model(x))
    before = net.predict(x, user="ann")
    net(x * 2, user=["ann", "bob"] * 4 + ["ann"])
    assert torch.equal(net.predict(x, user="ann"), before)
    assert net.state("ann").n == net.report("ann")["offered"] == 0
    assert not torch.equal(net.predict(x, user="bob"), before)
    assert (net.report("ann")["frozen"], net.report("bob")["frozen"]) == (True, False)
    assert net.report("bob")["calibrated"]
    net.load("eve", net.state("bob"))
    assert torch.equal(net.predict(x, user="eve"), net.predict(x, user="bob"))
    net.reset("ann")
    assert torch.equal(net.predict(x, user="ann"), model(x))


def test_calibrate_freezes_rule_that_includes_current():
    _, x, net = personalized("har", "tbn")
    net.calibrate(x, user="ann")
    torch.testing.assert_close(net.export("ann")(x), net.predict(x, user="ann"), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- priors


def test_prior_sets_initial_statistics():
    model, x = NETS["linear"]()
    prior = {"1": LayerPrior(torch.full((8,), 0.5), torch.full((8,), 2.0))}
    net = personalize(model, "pseudo", prior=prior)
    model[1].running_mean.fill_(0.5)
    model[1].running_var.fill_(2.0)
    assert torch.equal(net.predict(x, user="ann"), model(x))
    assert torch.equal(net.model(x), model(x))


# ---------------------------------------------------------------- errors


def expect_error(message, call):
    with pytest.raises(UserError, match=message):
        call()


def test_personalized_rejects_bad_input():
    model, x, net = personalized("linear")
    expect_error("has no layer that keeps any", lambda: personalize(nn.Linear(2, 2)))
    expect_error("itself is a normalization layer", lambda: personalize(nn.BatchNorm1d(2)))
    expect_error("duplicates='both' is unknown", lambda: personalize(model, "pseudo", duplicates="both"))
    expect_error("capacity=0 is too small", lambda: personalize(model, "pseudo", capacity=0))
    expect_error("use personalize.*classes=K", lambda: personalize(nn.Sequential(nn.BatchNorm1d(2))))
    expect_error("unknown layer of the prior '2'", lambda: personalize(model, "pseudo", {"2": LayerPrior(x[0], x[0])}))
    expect_error("shape .5. and the layer 8", lambda: personalize(model, "pseudo", {"1": LayerPrior(x[0], x[0])}))
    half = {"1": LayerPrior(torch.zeros(8), torch.ones(8), n0=torch.ones(8))}
    expect_error("n0 for some layers only, not for .'4'", lambda: personalize(model, "pseudo", half))
    expect_error("8 rows and 1 users", lambda: net.predict(x, user=["ann"]))
    expect_error("nothing to commit", net.commit)
    net(x, user="ann")
    expect_error("nothing to commit", net.commit)
    for message, options in (
        ("weight must have one number", {"weight": torch.ones(3)}),
        ("weight must have one number", {"weight": -torch.ones(8)}),
        ("posteriors must be .8, 3., not .8, 2.", {"posterior": torch.ones(8, 2)}),
        ("label must be one class per row, 0 to 2", {"label": torch.full((8,), 3)}),
    ):
        net.predict(x, user="ann")
        expect_error(message, lambda: net.commit(**options))
    small = personalize(model, "pseudo", capacity=2)
    expect_error("3 users in one batch exceed the capacity of 2", lambda: small(x[:3], user=[1, 2, 3]))
    expect_error("unknown user 'an'. Did you mean 'ann'", lambda: net.forget("an"))
    expect_error("then='thaw' is unknown", lambda: net.calibrate(x, user=1, then="thaw"))
    expect_error("calibration needs windows", lambda: net.calibrate(x[:0], user=1))
    expect_error("n0=-1 is out of range", lambda: net.calibrate(x, user=1, n0=-1))
    expect_error("8 windows and labels of shape .2.", lambda: net.calibrate(x, user=1, labels=torch.ones(2)))
    expect_error("normalizes every window by itself", lambda: personalize(model, "tbn").export("ann"))
    for text in ("pseudo:gate=0.5", "pseudo:diversity=1", "balanced"):
        gated = personalize(model, text)
        gated.predict(x, user="ann")
        expect_error("learns by class", gated.commit)


def test_bad_windows_and_names_change_no_state():
    _, x, net = personalized("linear")
    net(x, user="ann")
    before = net.state("ann").to_bytes()
    broken = x.clone()
    broken[3, 0] = torch.nan
    for message, call in (
        ("1 of 8 windows hold NaN or Inf .first: row 3.", lambda: net(broken, user="ann")),
        ("1 of 8 windows hold NaN or Inf", lambda: net.calibrate(broken, user="ann")),
        (f"does not accept windows of shape .{x.shape[1] + 1}.", lambda: net(torch.cat([x, x[:, :1]], 1), user="ann")),
        ("None is not a user", lambda: net(x, user=None)),
        ("None is not a user", lambda: net(x, user=["ann", None] * 4)),
        ("lacks windows of class 1, 2", lambda: net.calibrate(x, user="ann", labels=torch.zeros(8))),
        ("label 3 is not one of the 3 classes", lambda: net.calibrate(x, user="ann", labels=torch.arange(8))),
    ):
        expect_error(message, call)
        expect_error("nothing to commit", net.commit)
    assert net.state("ann").to_bytes() == before
    assert net.users == ["ann"]
    expect_error("8 of 8 windows are too large", lambda: net(x * 1e37, user="ann"))  # only their sum is not finite
    expect_error("these windows are too large", lambda: net.calibrate(x * 1e37, user="ann"))
    assert net.state("ann").to_bytes() == before


def test_personalize_rejects_model_that_folds_time():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.bn(x.flatten(0, 1))).view(len(x), -1, 2).mean(1)

    net = personalize(Folds())
    expect_error("received 12 rows for 4 windows", lambda: net.predict(torch.ones(4, 3, 5), user=1))


def test_personalize_keeps_state_names():
    model, _ = NETS["branched"]()
    net = personalize(model)
    assert net.model.state_dict().keys() == model.state_dict().keys()
    assert statistics_layers(net.model).keys() == statistics_layers(model).keys()


# ---------------------------------------------------------------- padded windows


def test_mask_excludes_padding_from_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(2 * 8, 3)).eval()
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([[8], [5], [2]])
    padded = x.masked_fill(~mask[:, None], 1e6)
    bank = personalize(net, "pseudo", classes=3)
    bank(padded, user=[0, 1, 2], mask=mask)
    for i, length in enumerate((8, 5, 2)):
        (moments,) = bank.state(i).parts["0"]
        valid = x[i, :, :length].double()
        torch.testing.assert_close(moments.mean, valid.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.variance(), valid.var(1, correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duplicates", ["merge", "sequential"])
def test_mask_applies_to_its_rows_and_deeper_layers(duplicates):
    torch.manual_seed(0)
    model = HarCNN((6, 28), 4).eval()
    x = torch.randn(3, 6, 28)
    mask = torch.arange(28) < torch.tensor([[28], [16], [16]])
    plain, masked, full = (personalize(model, "pseudo", duplicates=duplicates) for _ in range(3))
    out = plain(x, user=["ann", "bob", "bob"])
    assert torch.equal(full(x, user=["ann", "bob", "bob"], mask=torch.ones_like(mask)), out)
    masked(x, user=["ann", "bob", "bob"], mask=mask)
    assert masked.state("ann").to_bytes() == plain.state("ann").to_bytes(), "ann has no padding"
    half = personalize(model, "pseudo", duplicates=duplicates)
    half(x[1:], user="bob", mask=mask[1:])
    for path, (m,) in half.state("bob").parts.items():
        torch.testing.assert_close(m.mean, masked.state("bob").parts[path][0].mean, rtol=1e-5, atol=1e-5)
    for path, (m,) in plain.state("bob").parts.items():
        assert not torch.equal(m.mean, masked.state("bob").parts[path][0].mean)


def test_mask_rejects_bad_input():
    net = personalize(HarCNN((6, 32), 4).eval())
    x = torch.randn(2, 6, 32)
    expect_error(r"pass \[2, 32\], not \[2, 6\]", lambda: net(x, user=[0, 1], mask=torch.ones(2, 6)))
    empty = torch.arange(32) < torch.tensor([[3], [0]])
    expect_error("window is all padding", lambda: net(x, user=[0, 1], mask=empty))
    assert net.users == []


@pytest.mark.slow
def test_bank_holds_a_hundred_thousand_users():
    users, rows = 100_000, 5_000
    net = personalize(HarCNN((6, 16), 6).eval(), "pseudo", capacity=users)
    x = torch.randn(rows, 6, 16, generator=torch.Generator().manual_seed(0))
    for start in range(0, users, rows):
        net(x, user=range(start, start + rows))
    assert len(net.bank.slot) == users
    assert not net.bank.store, "all in memory"
    num_bytes = sum(t.numel() * t.element_size() for t in net.bank.rows.values())
    assert num_bytes < 4_100 * (users + 1), "4 kB per user in memory, 2 kB in the store"
    for user in (0, 54_321, users - 1):
        window = x[user % rows][None]
        assert torch.equal(net.predict(window, user=user), net.predict(window, user=user % rows))
    assert net.state(users - 1).n == 1
