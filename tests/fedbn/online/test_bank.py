from __future__ import annotations

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbn.errors import UserError
from fedbn.models.har_cnn import HarCNN
from fedbn.models.resnet20 import ResNet20
from fedbn.nn.batchnorm import AnyBatchNorm
from fedbn.nn.roles import statistics_layers
from fedbn.online import LayerPrior, personalize, rule
from fedbn.online.layer import row_moments
from fedbn.online.rules.base import rules
from fedbn.statistics.recalibration import recalibrate

EXCLUDES_CURRENT = [n for n, r in rules().items() if not r.includes_current and not r.classwise and not r.wants]


def warmed(net, *shape):
    """Random weights, scales and statistics; evaluation mode."""
    torch.manual_seed(0)
    for m in net.modules():
        if hasattr(m, "running_mean") and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            if m.weight is not None:
                nn.init.uniform_(m.weight, -2, 2)
                nn.init.normal_(m.bias)
    return net.eval(), torch.randn(*shape) * 2 + 1


class Branched(nn.Module):
    """BN of all kinds, nested, one shared by two paths, one without scale and shift, one that never runs."""

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
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )


NETS = {
    "har": lambda: warmed(HarCNN((3, 32), 4), 9, 3, 32),
    "resnet": lambda: warmed(ResNet20((3, 16, 16), 5), 6, 3, 16, 16),
    "branched": lambda: warmed(Branched(), 7, 1, 4, 6, 5),
    "linear": lambda: warmed(linear_net(), 8, 5),
    "double": lambda: (lambda n, x: (n.double(), x.double()))(*warmed(linear_net(), 8, 5)),
    "half": lambda: (lambda n, x: (n.bfloat16(), x.bfloat16()))(*warmed(linear_net(), 8, 5)),
}


# ---------------------------------------------------------------- newcomers and other users


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", EXCLUDES_CURRENT)
def test_a_new_user_gets_the_source_model_to_the_bit(net, name):
    model, x = NETS[net]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = personalize(model, rule(name))
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(adapted.predict(x, user=list(range(len(x)))), expected)
    adapted(x, user=["known"] * len(x))
    assert torch.equal(adapted.predict(x, user="unknown"), expected), "others have moved, a newcomer has not"
    adapted.reset("known")
    assert torch.equal(adapted.predict(x, user="known"), expected), "after a reset"
    assert adapted.users == ["known"], "looking makes nobody known"
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the model given is untouched"


@pytest.mark.parametrize("net", ["har", "branched", "linear"])
@pytest.mark.parametrize("name", ["pseudo", "dabn", "tbn", "unmix-tns", "pseudo:guard=true"])
def test_rows_of_others_change_a_row_by_no_bit(net, name):
    model, x = NETS[net]()
    users = [i % 3 for i in range(len(x))]
    mine = torch.tensor([u == 0 for u in users])
    changed = torch.where(mine.view(-1, *[1] * (x.dim() - 1)), x, x * 3 - 50)
    one, other = personalize(model, rule(name)), personalize(model, rule(name))
    for _ in range(3):
        a, b = one(x, user=users), other(changed, user=users)
    assert torch.equal(a[mine], b[mine])
    assert not torch.equal(a[~mine], b[~mine])


@pytest.mark.parametrize("net", ["har", "branched", "linear"])
@pytest.mark.parametrize("name", ["pseudo:n0=2", "ema:rate=0.3", "dabn", "dua", "tbn", "membn:size=3", "tema"])
def test_many_users_in_a_batch_are_each_alone(net, name):
    model, x = NETS[net]()
    model, x = model.double(), x.double()
    together, alone = personalize(model, rule(name)), personalize(model, rule(name))
    for step in range(3):
        batch = x * (1 + step) + torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1))
        out = together(batch, user=list(range(len(x))))
        single = torch.cat([alone(batch[i : i + 1], user=i) for i in range(len(x))])
        torch.testing.assert_close(out, single, rtol=1e-6, atol=1e-6)


def test_a_rule_follows_a_plain_batchnorm_with_the_users_statistics():
    model, x = NETS["har"]()
    adapted = personalize(model, rule("pseudo:n0=3"))
    adapted(x, user="ann")
    plain = adapted.export("ann")
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), adapted.predict(x, user="ann"), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain(x), model(x))


def test_the_first_layer_knows_the_exact_moments_of_what_a_user_sent():
    model, _ = NETS["linear"]()
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2
    adapted = personalize(model, rule("cumulative"))
    users = ["ann" if i % 3 else "bob" for i in range(40)]
    for rows in torch.arange(40).split(7):
        adapted(x[rows], user=[users[i] for i in rows.tolist()])
    for name in ("ann", "bob"):
        with torch.no_grad():
            inputs = model[0](x[[u == name for u in users]])
        mean, var = adapted.statistics(name)["1"]
        torch.testing.assert_close(mean, inputs.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, inputs.var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_a_layer_that_runs_twice_learns_from_both_and_one_that_never_runs_stays():
    model, x = NETS["branched"]()
    seen = []
    adapted = personalize(model, rule("cumulative"))
    adapted.model.shared.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    adapted(x[:1], user=1)
    both = torch.cat([s.transpose(0, 1).flatten(1) for s in seen[:2]], 1)
    mean, var = adapted.statistics(1)["shared"]
    torch.testing.assert_close(mean, both.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, both.var(1, correction=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(adapted.statistics(1)["unused"][0], model.unused.running_mean)


@given(
    offset=st.floats(-1e3, 1e3),
    shape=st.sampled_from([(2, 3), (2, 3, 5), (1, 3, 4, 2), (2, 3, 2, 2, 3)]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_row_moments_are_exact_far_from_zero(offset, shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset
    mean, var = row_moments(x, torch.full((3,), float(round(offset))))
    flat = x.double().flatten(2) if x.dim() > 2 else x.double()[:, :, None]
    torch.testing.assert_close(mean.double(), flat.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), flat.var(2, correction=0), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- duplicates


def test_sequential_duplicates_are_rows_one_after_the_other_in_any_order():
    model, x = NETS["har"]()
    users = ["a", "b", "a", "a", "c", "b", "c", "a", "d"]
    adapted = personalize(model, rule("pseudo:n0=2"), duplicates="sequential")
    slow = personalize(model, rule("pseudo:n0=2"))
    out = adapted(x, user=users)
    one_by_one = torch.cat([slow(x[i : i + 1], user=u) for i, u in enumerate(users)])
    torch.testing.assert_close(out, one_by_one, rtol=1e-5, atol=1e-6)
    for u in "abcd":
        assert adapted.state(u).n == slow.state(u).n == users.count(u)


def test_sequential_commits_fold_rows_in_order_and_merged_ones_take_them_as_one():
    model, x = NETS["linear"]()
    one = personalize(model, rule("ema:rate=0.5"), duplicates="sequential")
    two = personalize(model, rule("ema:rate=0.5"), duplicates="merge")
    for net in (one, two):
        net.predict(x[:2], user="ann")
        net.commit()
    with torch.no_grad():
        a, b = model[0](x[:2])
    start = model[1].running_mean
    torch.testing.assert_close(one.statistics("ann")["1"][0], 0.25 * start + 0.25 * a + 0.5 * b)
    torch.testing.assert_close(two.statistics("ann")["1"][0], 0.5 * start + 0.25 * a + 0.25 * b)
    assert (one.report("ann")["updates"], two.report("ann")["updates"]) == (2, 1)


def test_unknown_users_in_one_batch_are_not_one_user():
    model, x = NETS["har"]()
    net = personalize(model, rule("tbn"))
    torch.testing.assert_close(
        net.predict(x[:2], user=["x", "y"]), torch.cat([net.predict(x[i : i + 1], user="z") for i in range(2)])
    )


# ---------------------------------------------------------------- predict, commit, weights


def test_predict_never_updates_and_frozen_blocks_commit():
    model, x = NETS["har"]()
    net = personalize(model, rule("pseudo"))
    net(x, user="ann")
    state = net.state("ann").to_bytes()
    net.predict(x * 5, user="ann")
    with net.frozen():
        net(x * 5, user="ann")
        net.predict(x, user="ann")
        net.commit()
        with net.frozen():
            net(x, user="bob")
        net(x, user="bob")
    assert net.state("ann").to_bytes() == state
    assert net.users == ["ann"]
    net(x, user="ann")
    assert net.state("ann").to_bytes() != state


def test_a_commit_uses_what_predict_saw_whatever_happens_between():
    model, x = NETS["har"]()
    one, two = personalize(model, rule("pseudo")), personalize(model, rule("pseudo"))
    one(x, user="ann")
    two.predict(x, user="ann")
    two.train()
    two.model(x * 9)
    two.commit()
    assert one.state("ann").layers.keys() == two.state("ann").layers.keys()
    for path, m in one.state("ann").layers.items():
        assert torch.equal(m.mean, two.state("ann").layers[path].mean)


def test_weights_count_windows_and_zero_learns_nothing():
    model, x = NETS["linear"]()
    one, two = personalize(model, rule("pseudo:n0=1")), personalize(model, rule("pseudo:n0=1"))
    one.predict(x[:3], user="ann")
    one.commit(weight=torch.tensor([2.0, 0.0, 1.0]))
    two.predict(x[[0, 0, 2]], user="ann")
    two.commit()
    torch.testing.assert_close(one.statistics("ann")["1"], two.statistics("ann")["1"])
    two.predict(x[:2], user="cid")
    two.commit(posterior=torch.eye(3)[:2], weight=torch.tensor([2.0, 0.5]))
    assert two.state("cid").classes.tolist() == [2, 0.5, 0]
    one.predict(x[:1], user="bob")
    one.commit(weight=torch.zeros(1))
    assert one.report("bob")["learnt"] == 0
    assert one.report("bob")["offered"] == 1
    assert torch.equal(one.predict(x, user="bob"), one.predict(x, user="nobody"))


def test_capacity_evicts_the_one_met_longest_ago_and_brings_it_back_unchanged():
    model, x = NETS["har"]()
    store = {}
    small = personalize(model, rule("pseudo:n0=2"), capacity=2, store=store)
    large = personalize(model, rule("pseudo:n0=2"))
    order = ["a", "b", "a", "c", "a", "b", "d", "c", "a"]
    for i, u in enumerate(order):
        assert torch.equal(small(x[i : i + 1], user=u), large(x[i : i + 1], user=u)), (i, u)
        if i == 3:
            assert set(store) == {"b"}, "a was met after b"
    assert small.users == large.users == list("abcd")
    again = personalize(model, rule("pseudo:n0=2"), capacity=2, store=store)
    small.flush()
    assert torch.equal(again.predict(x[:2], user=["a", "b"]), large.predict(x[:2], user=["a", "b"]))
    again.forget("a")
    assert again.users == list("bcd")


def test_snapshot_and_restore_are_exact():
    model, x = NETS["har"]()
    net = personalize(model, rule("pseudo:n0=2:diversity=1"), capacity=2)
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


def test_two_threads_do_not_disturb_each_other():
    model, x = NETS["har"]()
    nets = [personalize(model, rule("pseudo")) for _ in range(2)]
    nets[1](x * 4, user="ann")
    expected = [n.predict(x, user="ann") for n in nets]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(nets[i].predict(x, user="ann"), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_it_can_be_copied_and_moved_to_double():
    model, x = NETS["linear"]()
    net = personalize(model, rule("pseudo"))
    net(x, user="ann")
    twin = copy.deepcopy(net)
    twin(x * 3, user="ann")
    assert net.state("ann").n == 8
    out = twin.double().predict(x.double(), user="ann")
    assert out.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(out, twin.export("ann")(x.double()))


# ---------------------------------------------------------------- calibration


def test_calibration_on_everything_without_prior_is_adabn():
    model, x = NETS["har"]()
    model = model.double()
    x = torch.randn(600, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1
    adapted = personalize(model, rule("adabn"))
    adapted.calibrate(x, user="ann", n0=0)
    offline = recalibrate(copy.deepcopy(model), x)
    for path, (mean, var) in adapted.statistics("ann").items():
        layer = offline.get_submodule(path)
        torch.testing.assert_close(mean, layer.running_mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(var, layer.running_var, rtol=2e-3, atol=2e-3)  # stored as n/(n-1) of it


def test_calibration_goes_layer_by_layer_with_a_prior_and_equal_classes():
    model, x = NETS["linear"]()
    y = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2])
    net = personalize(model, rule("pseudo:n0=4"))
    net.calibrate(x, user="ann", labels=y, n0=2.0)
    weight = torch.tensor([1 / 5] * 5 + [1.0] + [1 / 2] * 2) / 3
    inner = copy.deepcopy(model)
    with torch.no_grad():
        for i in (1, 4):
            h = inner[:i](x)
            mean = (weight[:, None] * h).sum(0)
            var = (weight[:, None] * (h - mean) ** 2).sum(0)
            m0, v0 = inner[i].running_mean.clone(), inner[i].running_var.clone()
            inner[i].running_mean.copy_(0.2 * m0 + 0.8 * mean)
            inner[i].running_var.copy_(0.2 * v0 + 0.8 * var + 0.16 * (mean - m0) ** 2)
        torch.testing.assert_close(net.predict(x, user="ann"), inner(x), rtol=1e-5, atol=1e-5)


def test_after_calibration_statistics_freeze_or_go_on_and_reset_forgets_it():
    model, x = NETS["har"]()
    net = personalize(model, rule("pseudo:n0=4"))
    for user, then in (("ann", "freeze"), ("bob", "adapt")):
        net.calibrate(x, user=user, then=then)
    with torch.no_grad():
        assert torch.equal(net.predict(x, user="ann"), net.predict(x, user="bob"))
        assert not torch.allclose(net.predict(x, user="ann"), model(x))
    before = net.predict(x, user="ann")
    net(x * 2, user=["ann", "bob"] * 4 + ["ann"])
    assert torch.equal(net.predict(x, user="ann"), before)
    assert net.state("ann").n == net.report("ann")["offered"] == 0
    assert not torch.equal(net.predict(x, user="bob"), before)
    assert (net.report("ann")["frozen"], net.report("bob")["frozen"]) == (True, False)
    assert net.report("bob")["calibrated"]
    state = net.state("bob")
    net.load("eve", state)
    assert torch.equal(net.predict(x, user="eve"), net.predict(x, user="bob"))
    net.reset("ann")
    with torch.no_grad():
        assert torch.equal(net.predict(x, user="ann"), model(x))


def test_frozen_users_of_a_peeking_rule_keep_their_calibration():
    model, x = NETS["har"]()
    net = personalize(model, rule("tbn"))
    net.calibrate(x, user="ann")
    with torch.no_grad():
        torch.testing.assert_close(net.export("ann")(x), net.predict(x, user="ann"), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- priors given


def test_a_given_prior_is_where_users_start():
    model, x = NETS["linear"]()
    prior = {"1": LayerPrior(torch.full((8,), 0.5), torch.full((8,), 2.0))}
    net = personalize(model, rule("pseudo"), prior=prior)
    other = copy.deepcopy(model)
    other[1].running_mean.fill_(0.5)
    other[1].running_var.fill_(2.0)
    with torch.no_grad():
        assert torch.equal(net.predict(x, user="ann"), other(x))
        assert torch.equal(net.model(x), other(x))


# ---------------------------------------------------------------- errors


def expect(words, act):
    with pytest.raises(UserError, match=words):
        act()


def test_mistakes_are_named():
    model, x = NETS["linear"]()
    net = personalize(model, rule("pseudo"))
    pseudo = rule("pseudo")
    expect("has no layer that keeps any", lambda: personalize(nn.Linear(2, 2), pseudo))
    expect("itself is a normalization layer", lambda: personalize(nn.BatchNorm1d(2), pseudo))
    expect("duplicates='both' is unknown", lambda: personalize(model, pseudo, duplicates="both"))
    expect("capacity=0 holds no user", lambda: personalize(model, pseudo, capacity=0))
    expect("say personalize.*classes=K", lambda: personalize(nn.Sequential(nn.BatchNorm1d(2)), pseudo))
    expect("unknown layer of the prior '2'", lambda: personalize(model, pseudo, {"2": LayerPrior(x[0], x[0])}))
    expect("shape .5. and the layer 8", lambda: personalize(model, pseudo, {"1": LayerPrior(x[0], x[0])}))
    half = {"1": LayerPrior(torch.zeros(8), torch.ones(8), n0=torch.ones(8))}
    expect("n0 of some layers only, not of .'4'", lambda: personalize(model, pseudo, half))
    expect("8 rows and 1 users", lambda: net.predict(x, user=["ann"]))
    expect("nothing to commit", net.commit)
    net(x, user="ann")
    expect("nothing to commit", net.commit)
    net.predict(x, user="ann")
    expect("weight must be one number", lambda: net.commit(weight=torch.ones(3)))
    net.predict(x, user="ann")
    expect("weight must be one number", lambda: net.commit(weight=-torch.ones(8)))
    net.predict(x, user="ann")
    expect("posteriors must be .8, 3., not .8, 2.", lambda: net.commit(posterior=torch.ones(8, 2)))
    net.predict(x, user="ann")
    expect("label must be one class a row, 0 to 2", lambda: net.commit(label=torch.full((8,), 3)))
    small = personalize(model, pseudo, capacity=2)
    expect("3 users in one batch and room for 2", lambda: small(x[:3], user=[1, 2, 3]))
    expect("unknown user 'an'. Did you mean 'ann'", lambda: net.forget("an"))
    expect("then='thaw' is unknown", lambda: net.calibrate(x, user=1, then="thaw"))
    expect("calibration needs windows", lambda: net.calibrate(x[:0], user=1))
    expect("n0=-1 is impossible", lambda: net.calibrate(x, user=1, n0=-1))
    expect("8 windows and labels of shape .2.", lambda: net.calibrate(x, user=1, labels=torch.ones(2)))
    expect("normalizes every window by itself", lambda: personalize(model, rule("tbn")).export("ann"))
    for text in ("pseudo:gate=0.5", "pseudo:diversity=1", "balanced"):
        gated = personalize(model, rule(text))
        gated.predict(x, user="ann")
        expect("learns by class", gated.commit)


def test_bad_windows_and_names_are_refused_and_no_state_moves():
    model, x = NETS["linear"]()
    net = personalize(model, rule("pseudo"))
    net(x, user="ann")
    before = net.state("ann").to_bytes()
    broken = x.clone()
    broken[3, 0] = torch.nan
    for words, act in (
        ("1 of 8 windows hold NaN or Inf .first: row 3.", lambda: net(broken, user="ann")),
        ("1 of 8 windows hold NaN or Inf", lambda: net.calibrate(broken, user="ann")),
        (f"does not take windows of shape .{x.shape[1] + 1}.", lambda: net(torch.cat([x, x[:, :1]], 1), user="ann")),
        ("None names no user", lambda: net(x, user=None)),
        ("None names no user", lambda: net(x, user=["ann", None] * 4)),
        ("lacks windows of class 1, 2", lambda: net.calibrate(x, user="ann", labels=torch.zeros(8))),
        ("label 3 is none of the 3 classes", lambda: net.calibrate(x, user="ann", labels=torch.arange(8))),
    ):
        expect(words, act)
        expect("nothing to commit", net.commit)
    assert net.state("ann").to_bytes() == before
    assert net.users == ["ann"]
    net(x * 1e37, user="bob")  # large, but finite: only the sum is not


def test_a_model_that_folds_time_into_the_batch_is_refused():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.bn(x.flatten(0, 1))).view(len(x), -1, 2).mean(1)

    expect(
        "met 12 rows where 4 windows", lambda: personalize(Folds(), rule("pseudo")).predict(torch.ones(4, 3, 5), user=1)
    )


def test_names_of_state_entries_stay():
    model, _ = NETS["branched"]()
    net = personalize(model, rule("pseudo"))
    assert net.model.state_dict().keys() == model.state_dict().keys()
    assert statistics_layers(net.model).keys() == statistics_layers(model).keys()


# ---------------------------------------------------------------- padded windows


def test_padding_enters_no_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(2 * 8, 3)).eval()
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    real = torch.arange(8) < torch.tensor([[8], [5], [2]])
    padded = x.masked_fill(~real[:, None], 1e6)
    bank = personalize(net, rule("pseudo"), classes=3)
    bank(padded, user=[0, 1, 2], mask=real)
    for i, length in enumerate((8, 5, 2)):
        (moments,) = bank.state(i).parts["0"]
        alone = x[i, :, :length].double()
        torch.testing.assert_close(moments.mean, alone.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.variance(), alone.var(1, correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duplicates", ["merge", "sequential"])
def test_a_mask_follows_its_rows_and_deeper_layers(duplicates):
    torch.manual_seed(0)
    model = HarCNN((6, 28), 4).eval()
    x = torch.randn(3, 6, 28)
    real = torch.arange(28) < torch.tensor([[28], [16], [16]])
    plain, masked, full = (personalize(model, rule("pseudo"), duplicates=duplicates) for _ in range(3))
    out = plain(x, user=["ann", "bob", "bob"])
    assert torch.equal(full(x, user=["ann", "bob", "bob"], mask=torch.ones_like(real)), out)
    masked(x, user=["ann", "bob", "bob"], mask=real)
    assert masked.state("ann").to_bytes() == plain.state("ann").to_bytes(), "nothing of ann's is padding"
    half = personalize(model, rule("pseudo"), duplicates=duplicates)
    half(x[1:], user="bob", mask=real[1:])
    for path, (m,) in half.state("bob").parts.items():
        torch.testing.assert_close(m.mean, masked.state("bob").parts[path][0].mean, rtol=1e-5, atol=1e-5)
    assert all(
        not torch.equal(m[0].mean, k[0].mean)
        for m, k in zip(masked.state("bob").parts.values(), plain.state("bob").parts.values(), strict=True)
    )


def test_impossible_masks_say_why():
    net = personalize(HarCNN((6, 32), 4).eval(), rule("pseudo"))
    x = torch.randn(2, 6, 32)
    with pytest.raises(UserError, match=r"give \[2, 32\], not \[2, 6\]"):
        net(x, user=[0, 1], mask=torch.ones(2, 6))
    with pytest.raises(UserError, match="padding from end to end"):
        net(x, user=[0, 1], mask=torch.arange(32) < torch.tensor([[3], [0]]))
    assert net.users == []


@pytest.mark.slow
def test_a_hundred_thousand_users_fit_one_process():
    users, rows = 100_000, 5_000
    net = personalize(HarCNN((6, 16), 6).eval(), rule("pseudo"), capacity=users)
    x = torch.randn(rows, 6, 16, generator=torch.Generator().manual_seed(0))
    for start in range(0, users, rows):
        net(x, user=range(start, start + rows))
    assert len(net.bank.slot) == users
    assert not net.bank.store, "all at hand"
    held = sum(t.numel() * t.element_size() for t in net.bank.rows.values())
    assert held < 4_100 * (users + 1), "4 kB a user at hand, 2 kB at rest"
    for user in (0, 54_321, users - 1):
        assert torch.equal(
            net.predict(x[user % rows][None], user=user), net.predict(x[user % rows][None], user=user % rows)
        )
    assert net.state(users - 1).n == 1
