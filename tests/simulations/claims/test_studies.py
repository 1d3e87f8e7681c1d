"""What single studies do besides training: cameras, batches, choices in favor of the other side."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fedbn.data.population import Examples
from fedbn.federation.metrics import Score
from fedbn.federation.server import Outcome
from fedbn.models.small_cnn import SmallCNN
from fedbn.nn.conversion import convert
from fedbn.norms import bne
from fedbn.scenarios.base import scenario
from simulations.claims import claims
from simulations.claims.studies import (
    batch_norm,
    binary,
    diminishing,
    embeddings,
    evalnorm,
    fedtan,
    full_norm,
    normalizers,
    personal,
    pretrained,
    resmlp,
    stroke,
)
from simulations.claims.studies import common as bench


def linear(rows, seed=0):
    """Two classes that one pixel tells."""
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0, 3, 3] > 0.5).long()
    return Examples(x, y, torch.zeros_like(y))


# --- the six domains


def test_six_domains_are_smaller_digits_and_apart():
    domains = bench.digit_domains()
    assert tuple(domains) == bench.DOMAINS
    whole = scenario("digits:test=500").load(0).users
    for user in whole:
        train, test = domains[user.name]
        assert train.x.shape == (743, 3, 14, 14)
        assert len(test) <= 500
        torch.testing.assert_close(train.x[5, :, 2, 3], user.train.x[5, :, 4:6, 6:8].mean((1, 2)))
        assert torch.equal(train.y, user.train.y)


def test_the_mixture_is_of_branches_and_the_uniform_one_weighs_them_alike():
    torch.manual_seed(0)
    model = convert(SmallCNN((1, 8, 8), 2), "bne", domains=2)
    for i, layer in enumerate(bne.domain_layers(model).values()):
        layer.domain_mean[1] += 2.0 + i
    mixture, x = bne.BNE(model), linear(7).x
    alone = []
    for d in range(2):
        bne.set_domain(model, d)
        alone.append(model.eval()(x).softmax(1).detach())
    torch.testing.assert_close(embeddings.probabilities(mixture, x, uniform=True), (alone[0] + alone[1]) / 2)
    weighted = embeddings.probabilities(mixture, x, uniform=False)
    torch.testing.assert_close(weighted.sum(1), torch.ones(7))
    assert (weighted - (alone[0] + alone[1]) / 2).abs().max() > 1e-3


def test_what_is_measured_names_every_arm_that_reads_it(monkeypatch):
    few = {d: tuple(e.take(torch.arange(64)) for e in pair) for d, pair in bench.digit_domains().items()}
    monkeypatch.setattr(embeddings, "digit_domains", lambda: few)
    found = {}
    for cell in ("branches", "mixture", "one BN"):
        found |= embeddings.unseen(cell, 0, True)
    assert set(found) == {f"accuracy: {arm}" for arm in claims(["bne-weights"])[0].arms}
    assert all(0 <= v <= 1 for v in found.values())


# --- people


def test_a_batch_is_one_users():
    sizes = [70, 33, 64]
    data = Examples(torch.zeros(sum(sizes), 1), torch.zeros(sum(sizes)).long(), torch.zeros(sum(sizes)).long())
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    got = list(personal.one_user_a_batch(data, sizes, 2, seed=0))
    assert len(got) == 2 * (2 + 1 + 2)
    assert all(len(rows) == 32 and len(owner[rows].unique()) == 1 for rows in got)
    assert len(set(torch.cat(got[:5]).tolist())) == 5 * 32
    assert [int(owner[r[0]]) for r in got] != sorted(int(owner[r[0]]) for r in got)


def test_a_stranger_starts_from_the_mean_of_users_statistics():
    """One BN layer on the data: what every user's running statistics are can be followed by hand."""
    draw = torch.Generator().manual_seed(3)
    users = []
    for mean, rows in ((0.0, 64), (4.0, 32), (9.0, 20)):  # the last has less than a batch
        x = torch.randn(rows, 2, generator=draw) + mean
        users.append(Examples(x, torch.arange(rows) % 2, torch.zeros(rows).long()))
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    personal.trained_by_user(model, users, 3, seed=0)
    sizes, want = [len(u) for u in users], {0: [torch.zeros(2), torch.ones(2)], 1: [torch.zeros(2), torch.ones(2)]}
    data = Examples.concat(users)
    for rows in personal.one_user_a_batch(data, sizes, 3, 0):
        mine = want[int(rows[0] >= 64)]
        mine[0] = 0.9 * mine[0] + 0.1 * data.x[rows].mean(0)
        mine[1] = 0.9 * mine[1] + 0.1 * data.x[rows].var(0)
    assert type(model[0]).__name__ == "AnyBatchNorm" or isinstance(model[0], nn.BatchNorm1d)
    torch.testing.assert_close(model[0].running_mean, (want[0][0] + want[1][0]) / 2)
    torch.testing.assert_close(model[0].running_var, (want[0][1] + want[1][1]) / 2)


def test_dropout_gets_its_best_rate_and_bn_five_times_that():
    errors = {f"dropout {r}": e for r, e in zip(pretrained.PAIRS["dropout"], (0.5, 0.2, 0.3, 0.9))}
    errors |= {f"bn {r}": e for r, e in zip(pretrained.PAIRS["bn"], (0.01, 0.15, 0.02, 0.03))}
    assert pretrained.at_best_rate(errors) == pytest.approx(0.05)
    for low, high in zip(pretrained.PAIRS["dropout"], pretrained.PAIRS["bn"]):
        assert float(high) == pytest.approx(5 * float(low))
    (claim,) = claims(["pretrained-rate"])
    assert set(claim.arms) == set(errors)


def test_embeddings_are_of_unit_length_balanced_and_not_linearly_given():
    data, test = resmlp.embeddings(0, 512)
    torch.testing.assert_close(data.x.norm(dim=1), torch.ones(512))
    assert 0.4 < float(data.y.double().mean()) < 0.6
    assert len(data) == len(test) == 512
    assert not torch.equal(data.x, test.x)


def test_a_federated_accuracy_is_of_one_cell_of_the_matrix():
    scores = {0: [Score("own", "aggregated", 9, 0.5, 0, 0), Score("own", "recalibrated", 9, 0.9, 0, 0)]}
    scores[1] = [Score("own", "aggregated", 9, 0.7, 0, 0), Score("global", "aggregated", 9, 0.1, 0, 0)]
    outcome = Outcome.__new__(Outcome)
    outcome.scores = scores
    assert bench.mean_accuracy(outcome, "own") == pytest.approx(0.6)
    assert bench.mean_accuracy(outcome, "global") == pytest.approx(0.1)


def test_a_federated_cell_is_determined_by_its_arguments():
    def one():
        return normalizers.federated("groupnorm", 0, True, scenario="digits8", partition="natural", rounds=1)

    assert one() == one()
    assert set(one()) == {"own test", "global test"}


# --- single quantities


def test_activations_that_only_move_are_as_far_as_they_moved(monkeypatch):
    """Weights at rest but for a bias that grows by 0.01 a step: 0.1 in ten steps, over each unit's spread."""
    data, _ = bench.digits(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).requires_grad_(False)
    monkeypatch.setattr(batch_norm, "_mlp", lambda *_: model)

    def rest(model, data, order, optimizer, on_step):
        for _ in range(35):
            model[1].bias += 0.01
            on_step()

    monkeypatch.setattr(batch_norm, "train", rest)
    found = batch_norm.shift("none", 0, True)["shift in ten steps"]
    spread = model[:2](data.x[:256]).std(0)
    assert found == pytest.approx(float((0.1 / spread).mean()), rel=1e-4)


def test_initial_weights_times_a_gain():
    plain, larger = (batch_norm._mlp("BN", 0, gain=g) for g in (1.0, 3.0))
    for a, b in zip(plain, larger):
        if isinstance(a, nn.Linear):
            torch.testing.assert_close(3 * a.weight, b.weight)


def test_spread_and_loss_over_arms():
    values = {f"BN {g}": 0.9 for g in batch_norm.GAINS} | {"BN 10": 0.4, "BN 32": 0.95, "BN 2": 0.85}
    assert batch_norm.spread(values, "BN") == pytest.approx(0.5)
    assert batch_norm.lost(values, "BN", "2") == pytest.approx(0.1)


@pytest.mark.parametrize("arm", ["before the ReLU", "after the ReLU", "before the convolution", "nowhere"])
def test_bn_stands_where_the_arm_says(arm, monkeypatch):
    seen = []
    monkeypatch.setattr(batch_norm, "train", lambda model, *_: seen.append(model))
    batch_norm.placement(arm, 0, True)
    names = [type(m).__name__ for m in seen[0]][:3]
    assert (
        names
        == {
            "before the ReLU": ["Conv2d", "BatchNorm2d", "ReLU"],
            "after the ReLU": ["Conv2d", "ReLU", "BatchNorm2d"],
            "before the convolution": ["BatchNorm2d", "Conv2d", "ReLU"],
            "nowhere": ["Conv2d", "ReLU", "MaxPool2d"],
        }[arm]
    )


def test_the_errors_spread_is_that_of_the_second_half():
    got = diminishing._summary([0.9, 0.8, 0.1, 0.3])
    assert got["error"] == 0.3
    assert got["spread over epochs"] == pytest.approx(math.sqrt(0.02))


def test_the_weight_of_an_example_is_chosen_on_held_out_data():
    held_out = linear(40)
    torch.manual_seed(1)
    model = SmallCNN((1, 8, 8), 2)
    chosen = evalnorm.weighed(model, held_out)
    best = min(
        evalnorm.WEIGHTS,
        key=lambda w: float(
            nn.functional.cross_entropy(convert(copy.deepcopy(model), "iew", w=w).eval()(held_out.x), held_out.y)
        ),
    )
    assert {m.w for m in chosen.modules() if hasattr(m, "w")} == {best}


def test_evaluated_as_trained_nothing_differs():
    """A batch as large as the data: training and evaluating by itself is one thing, loss and activations."""
    data = linear(700)
    torch.manual_seed(0)
    model = SmallCNN((1, 8, 8), 2)
    loss, right, seen = evalnorm._in_batches(model, data, 700, 0)
    out, found = evalnorm._watched(copy.deepcopy(model).train(), data.x)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(out, data.y)), rel=1e-5)
    assert right == float((out.argmax(1) == data.y).double().mean())
    assert len(found) == 2
    # Not equal: rows are in another order, and quantiles are of every seventh value.
    assert max(evalnorm.distance(seen[k], found[k]) for k in found) < 0.05
    assert min(evalnorm.distance(seen[k], found[k] + 0.2) for k in found) > 0.15


def test_full_normalization_forgets_the_wrong_gradient_and_bn_does_not():
    errors = [full_norm.gradient_error(arm, 0, True)["gradient error"] for arm in ("FN 0.3", "FN 0.03", "BN 0.03")]
    assert errors[1] < errors[0] / 3
    assert errors[2] > 0.5


def test_fedtans_first_gradient_is_that_of_all_data_and_global_bns_is_not():
    exact = fedtan.gradients("fedtan sorted", 0, True)
    naive = fedtan.gradients("global-naive sorted", 0, True)
    assert max(exact.values()) < 1e-4
    assert min(naive.values()) > 0.1
    assert set(exact) == {f"gradient deviation: fedtan sorted {i}" for i in fedtan.LAYERS}


@pytest.mark.parametrize(("model", "exchanges"), [("mlp", 4), ("small-cnn", 7)])
def test_fedtans_exchanges_are_counted(model, exchanges):
    got = fedtan.cost(model, 0, True)
    assert (got["exchanges"], got["exchanges beyond 3L+1"]) == (exchanges, 0)
    channels = {"mlp": 32, "small-cnn": 24}[model]
    entries = {"mlp": 64 * 32 + 32 + 5 * 32 - 32 + 32 * 10 + 10, "small-cnn": 72 + 1152 + 4 * 24 + 650}[model]
    # mean, variance and two gradients a channel; batch counters do not travel.
    assert got["share of the model"] == pytest.approx(4 * channels / entries, rel=0.05)


def test_growth_follows_the_law_without_normalization():
    got = {arm: binary.growth(arm, 0, True)["growth per layer"] for arm in ("none", "bn")}
    assert got["none"] == pytest.approx(binary.LAW, rel=0.05)
    assert got["bn"] == pytest.approx(math.sqrt(0.683), rel=0.05)


def test_a_gain_of_the_grid_is_the_mean_over_settings_with_the_words():
    values = {f"{n} @ {s}": 0.5 for n in ("GN", "BN") for s in normalizers.SETTINGS}
    values |= {"GN @ small-cnn labels 4": 0.9, "GN @ mlp labels 32": 0.7, "GN @ mlp iid 32": 0.1}
    assert normalizers.mean_gain(values, "GN", "BN", "labels") == pytest.approx(0.6 / 4)
    assert normalizers.mean_gain(values, "GN", "BN", "labels", "mlp", "32") == pytest.approx(0.2)
    assert len(normalizers.SETTINGS) == 12
    (claim,) = claims(["grid-labels"])
    assert len(claim.arms) == 6 * 12 - 6


def test_a_cell_of_the_grid_is_a_federated_run():
    assert 0 < normalizers.grid("IN @ small-cnn iid 32", 0, True)["accuracy"] <= 1


def test_frozen_layers_and_statistics_stay_as_they_were(monkeypatch):
    few = {d: tuple(e.take(torch.arange(100)) for e in pair) for d, pair in bench.digit_domains().items()}
    monkeypatch.setattr(pretrained, "digit_domains", lambda: few)
    trained = []
    real = pretrained._descended
    monkeypatch.setattr(pretrained, "_descended", lambda model, *rest: trained.append(model) or real(model, *rest))
    got = pretrained.transfer("elsewhere", 0, True)
    assert [type(m).__name__ for m in trained] == ["AlexNetCvgj", "Linear", "AlexNetCvgj"]
    assert set(got) | {"error: from scratch"} == {f"error: {way}" for way in pretrained.WAYS}


def test_features_of_hapt_are_of_people_that_never_train():
    data, test = resmlp._table("hapt", 0)
    population = scenario("hapt").load(0)
    assert len(test) == sum(len(population.users[i].train) for i in population.unseen)
    assert data.x.shape[1] == 30
    assert float(data.x.mean(0).abs().max()) < 1e-4
    rows = {r.numpy().tobytes() for r in data.x}
    assert sum(r.numpy().tobytes() in rows for r in test.x) < len(test) / 100


def test_a_table_is_cut_once():
    data, test = resmlp._table("wine", 1)
    assert len(data) + len(test) == 178
    assert float(data.x.std(0).sub(1).abs().max()) < 1e-4
    assert not torch.equal(resmlp._table("wine", 2)[1].y, test.y)


def test_the_network_is_measured_against_the_best_classical_rule():
    values = dict.fromkeys((*stroke.NETWORKS, *stroke.CLASSICAL), 0.5) | {"SVM": 0.7, "bn 20": 0.8}
    assert stroke.ahead(values) == pytest.approx(0.1)


def test_every_subject_is_left_out_once_at_full_size(monkeypatch):
    asked = []
    monkeypatch.setattr(stroke, "network", lambda norm, epochs, made, k, seed: asked.append(k) or {5: (0.5, 0.4)})
    assert stroke.left_out("none", 0, False) == {"accuracy: none 5": 0.5, "F-score: none 5": 0.4}
    stroke.left_out("bn", 0, True)
    assert asked == [62, 5]


def test_a_score_on_the_way_is_that_of_a_shorter_training():
    made = stroke.cohort(8, 4, 0)
    both, short = (stroke.network("bn", epochs, made, 4, 1) for epochs in ((2, 4), (2,)))
    assert both[2] == short[2]
    assert set(both) == {2, 4}


def test_answers_are_of_models_that_never_saw_the_subject():
    """Labels that only memory of the subject could tell: nobody may do better than chance."""
    draw = torch.Generator().manual_seed(0)
    subject = torch.arange(20).repeat_interleave(6)
    y = torch.randint(2, (20,), generator=draw)[subject]
    x = torch.randn(20, 1, 24, generator=draw)[subject] + 0.01 * torch.randn(120, 1, 24, generator=draw)
    made = stroke.Cohort(x, y, subject)
    for right, f_score in stroke.classical(made, 20, 0).values():
        assert right < 0.8
        assert 0 <= f_score <= 1
