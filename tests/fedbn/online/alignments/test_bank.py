"""Alignment in a personalized model: predictions, states, stores."""

import copy

import pytest
import torch
from torch import nn

from fedbn.errors import UserError
from fedbn.online import BNState, fit_alignment, personalize
from fedbn.online.alignments import quaternions as so3
from fedbn.online.personalized import personalized_copy
from fedbn.online.prior import layer_priors
from fedbn.online.release import Release
from tests.fedbn.online.alignments.data import CLASSES, TRIPLES, clients, turn, windows

Q = so3.from_vector(torch.tensor([0.5, 0.3, 0.0]))


@pytest.fixture(scope="module")
def aligner():
    return fit_alignment("rotation:cells=8", clients(), CLASSES, TRIPLES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = nn.Conv1d(6, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, CLASSES)).eval()


@pytest.fixture
def net(model, aligner):
    return personalize(model, "pseudo:n0=8", align=aligner)


def follow(net, x, user="ann"):
    return torch.cat([net(row, user=user) for row in x.split(1)])


def test_network_gets_the_aligned_windows(model, aligner):
    net, plain = personalize(model, "source", align=aligner), personalize(model, "source")
    x = windows(41, 1, q=Q)[0]
    out = follow(net, x[:40])
    assert torch.equal(out[:5], follow(plain, x[:5]))  # the first estimate is after five windows
    q = net.bank.rows["align_value"][net.bank.slot["ann"]]
    assert so3.to_vector(q).norm() > 0.3
    assert torch.allclose(net.predict(x[40:], user="ann"), plain.predict(turn(x[40:], q), user="ann"), atol=1e-5)
    assert torch.equal(net.predict(x[40:], user="unknown"), plain.predict(x[40:], user="unknown"))


def test_aligned_predictions_do_not_depend_on_later_windows(net, model, aligner):
    x = windows(40, 1, q=Q)[0]
    other = personalize(model, "pseudo:n0=8", align=aligner)
    changed = torch.cat([x[:20], windows(20, 2)[0]])
    assert torch.equal(follow(net, x)[:20], follow(other, changed)[:20])


def test_users_are_aligned_separately(model, aligner):
    together, alone = (personalize(model, "pseudo:n0=8", align=aligner) for _ in range(2))
    ann, bob = windows(30, 1, q=Q)[0], windows(30, 2)[0]
    for a, b in zip(ann, bob, strict=True):
        together(torch.stack([a, b]), user=["ann", "bob"])
    follow(alone, ann)
    assert torch.allclose(
        together.bank.rows["align_value"][together.bank.slot["ann"]], alone.bank.rows["align_value"][1], atol=1e-6
    )
    angles = [together.report(user)["alignment"]["degrees"] for user in ("ann", "bob")]
    assert angles[0] > angles[1] + 10


def test_rows_of_one_user_in_a_batch_are_learned_in_order(model, aligner):
    one, batch = (personalize(model, "source", align=aligner) for _ in range(2))
    x = windows(30, 1, q=Q)[0]
    follow(one, x)
    batch(x, user="ann")
    assert torch.equal(one.bank.rows["align_n"], batch.bank.rows["align_n"])
    assert torch.equal(one.bank.rows["align_value"], batch.bank.rows["align_value"])


def test_frozen_model_and_weight_zero_learn_no_alignment(net):
    x = windows(10, 1, q=Q)[0]
    with net.frozen():
        net(x, user="ann")
    assert net.users == []
    net.predict(x, user="ann")
    net.commit(weight=torch.zeros(10))
    assert not net.bank.rows["align_n"].any()


def test_state_of_an_aligned_user_survives_bytes_and_load(net, model, aligner):
    x = windows(45, 1, q=Q)[0]
    follow(net, x[:33])
    state = net.state("ann")
    back = BNState.from_bytes(state.to_bytes(), net.bank.model, net.bank.rule_text)
    other = personalize(model, "pseudo:n0=8", align=aligner)
    other.load("bob", back)
    assert torch.allclose(follow(other, x[33:], "bob"), follow(net, x[33:]), atol=1e-5)
    assert back.rule == "rotation:cells=8+pseudo:n0=8.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_does_not_change_with_later_windows(model, aligner, dtype):
    net = personalize(copy.deepcopy(model).to(dtype), "pseudo:n0=8", align=aligner)
    x = windows(20, 1, q=Q)[0].to(dtype)
    follow(net, x[:10])
    state = net.state("ann")
    before = state.to_bytes()
    follow(net, x[10:])
    assert state.to_bytes() == before


def test_aligned_users_survive_eviction_and_snapshot(model, aligner):
    small = personalize(model, "pseudo:n0=8", align=aligner, capacity=1)
    large = personalize(model, "pseudo:n0=8", align=aligner)
    for t, row in enumerate(windows(24, 1, q=Q)[0].split(1)):
        user = f"user{t % 2}"
        assert torch.equal(small(row, user=user), large(row, user=user))
    before, x = large.snapshot(), windows(12, 2)[0]
    first = follow(large, x, "user0")
    large.restore(before)
    assert torch.equal(follow(large, x, "user0"), first)


def test_merged_state_has_the_windows_of_both(net):
    follow(net, windows(20, 1, q=Q)[0])
    follow(net, windows(30, 2, q=Q)[0], "bob")
    state = net.state("ann").merge(net.state("bob"))
    assert float(state.alignment["n"].sum()) == 50
    assert state.alignment["count"].tolist() == [50, 0]
    assert torch.equal(state.alignment["value"], net.state("bob").alignment["value"])
    net.merge("ann", net.state("bob"))
    assert net.bank.rows["align_n"].shape[1] == 8
    assert float(net.state("ann").alignment["n"].sum()) == 50
    assert float(net.state("ann").decay(0.5).alignment["n"].sum()) == 25


def test_reset_and_forget_remove_the_alignment(net):
    x = windows(20, 1, q=Q)[0]
    fresh = net.predict(x, user="ann")
    for remove in (net.reset, net.forget):
        follow(net, x)
        assert not torch.equal(net.predict(x, user="ann"), fresh)
        remove("ann")
        assert torch.equal(net.predict(x, user="ann"), fresh)


def test_calibration_aligns_first(net, model, aligner):
    x = windows(48, 1, q=Q)[0]
    net.calibrate(x, user="ann")
    q = net.bank.rows["align_value"][net.bank.slot["ann"]]
    assert so3.to_vector(q).norm() > 0.3
    plain = personalize(model, "pseudo:n0=8")
    plain.calibrate(turn(x, q), user="ann")
    assert torch.allclose(net.predict(x, user="ann"), plain.predict(turn(x, q), user="ann"), atol=1e-4)


def test_calibration_does_not_change_other_users(net):
    x = windows(10, 1, q=Q)[0]
    before = net.predict(x, user="bob")
    net.calibrate(windows(48, 1, q=Q)[0], user="ann")
    assert torch.equal(net.predict(x, user="bob"), before)
    assert so3.to_vector(net.bank.aligner.identity).norm() == 0


def test_frozen_user_keeps_its_alignment(net):
    net.calibrate(windows(24, 1, q=Q)[0], user="ann", then="freeze")
    before = net.state("ann").alignment
    follow(net, windows(24, 2)[0])
    assert all(torch.equal(value, before[name]) for name, value in net.state("ann").alignment.items())


def test_state_with_another_alignment_is_refused(net, model):
    follow(net, windows(10, 1)[0])
    state = net.state("ann")
    with pytest.raises(UserError, match="belongs to rule"):
        personalize(model, "pseudo:n0=8").load("ann", state)
    for name, value in (("n", torch.tensor([-1.0])), ("value", torch.full((4,), torch.nan)), ("mean", torch.zeros(3))):
        broken = BNState(**{**vars(state), "alignment": {**state.alignment, name: value}})
        with pytest.raises(UserError, match="its alignment"):
            net.load("ann", broken)


def test_an_aligned_state_cannot_be_split_or_exported(net):
    follow(net, windows(10, 1)[0])
    state = net.state("ann")
    with pytest.raises(UserError, match="cannot be removed from an aligned state"):
        state.merge(state).unmerge(state)
    for export in (lambda: net.export("ann"), lambda: personalized_copy(net.model, state)):
        with pytest.raises(UserError, match="a plain network cannot align its input"):
            export()


def test_release_has_no_alignment(net, model):
    follow(net, windows(20, 1)[0])
    released = Release(minimum=10).apply(net.state("ann"), layer_priors(model))
    assert released.alignment == {}
    net.load("bob", released)
    assert not net.state("bob").alignment["n"].numel()


def test_windows_with_nan_are_refused_and_change_nothing(net):
    x = windows(10, 1)[0]
    follow(net, x)
    before = net.state("ann").alignment
    bad = x[:1].clone()
    bad[0, 0, 3] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        net(bad, user="ann")
    assert all(torch.equal(value, before[name]) for name, value in net.state("ann").alignment.items())
