"""Tests of the studies: data, batches, measures and selections."""

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
from fedbn_simulations.claims import claims
from fedbn_simulations.claims.studies import (
    alignment,
    batch_norm,
    binary,
    common,
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


def linear(rows, seed=0):
    """Two classes that depend on one pixel."""
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0, 3, 3] > 0.5).long()
    return Examples(x, y, torch.zeros_like(y))


# --- the six domains


def test_digit_domains_are_downsampled():
    domains = common.digit_domains()
    assert tuple(domains) == common.DOMAINS
    for user in scenario("digits:test=500").load(0).users:
        train, test = domains[user.name]
        assert train.x.shape == (743, 3, 14, 14)
        assert len(test) <= 500
        torch.testing.assert_close(train.x[5, :, 2, 3], user.train.x[5, :, 4:6, 6:8].mean((1, 2)))
        assert torch.equal(train.y, user.train.y)


def test_probabilities_weighted_and_uniform():
    torch.manual_seed(0)
    model = convert(SmallCNN((1, 8, 8), 2), "bne", domains=2)
    for i, layer in enumerate(bne.domain_layers(model).values()):
        layer.domain_mean[1] += 2.0 + i
    mixture, x = bne.BNE(model), linear(7).x
    branches = []
    for d in range(2):
        bne.set_domain(model, d)
        branches.append(model.eval()(x).softmax(1).detach())
    torch.testing.assert_close(embeddings.probabilities(mixture, x, uniform=True), (branches[0] + branches[1]) / 2)
    weighted = embeddings.probabilities(mixture, x, uniform=False)
    torch.testing.assert_close(weighted.sum(1), torch.ones(7))
    assert (weighted - (branches[0] + branches[1]) / 2).abs().max() > 1e-3


@pytest.mark.slow
def test_unseen_measures_every_arm(monkeypatch):
    few = {d: tuple(e.take(torch.arange(64)) for e in pair) for d, pair in common.digit_domains().items()}
    monkeypatch.setattr(embeddings, "digit_domains", lambda: few)
    trainings = ("branches", "mixture", "one BN")
    measured = {k: v for training in trainings for k, v in embeddings.unseen(training, 0, True).items()}
    assert set(measured) == {f"accuracy: {arm}" for arm in claims(["bne-weights"])[0].arms}
    assert all(0 <= v <= 1 for v in measured.values())


# --- people


def test_one_user_a_batch_has_single_user():
    sizes = [70, 33, 64]
    data = Examples(torch.zeros(sum(sizes), 1), torch.zeros(sum(sizes)).long(), torch.zeros(sum(sizes)).long())
    user_of_row = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    batches = list(personal.one_user_a_batch(data, sizes, 2, seed=0))
    assert len(batches) == 2 * (2 + 1 + 2)
    assert all(len(rows) == 32 and len(user_of_row[rows].unique()) == 1 for rows in batches)
    assert len(set(torch.cat(batches[:5]).tolist())) == 5 * 32
    assert [int(user_of_row[r[0]]) for r in batches] != sorted(int(user_of_row[r[0]]) for r in batches)


def test_train_by_user_gives_mean_statistics():
    """With one BN layer on the data, the running statistics of every user can be computed directly."""
    rng = torch.Generator().manual_seed(3)
    users = []
    for mean, rows in ((0.0, 64), (4.0, 32), (9.0, 20)):  # the last has less than a batch
        x = torch.randn(rows, 2, generator=rng) + mean
        users.append(Examples(x, torch.arange(rows) % 2, torch.zeros(rows).long()))
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    personal.train_by_user(model, users, 3, seed=0)
    sizes, expected = [len(u) for u in users], {0: [torch.zeros(2), torch.ones(2)], 1: [torch.zeros(2), torch.ones(2)]}
    data = Examples.concat(users)
    for rows in personal.one_user_a_batch(data, sizes, 3, 0):
        statistics = expected[int(rows[0] >= 64)]
        statistics[0] = 0.9 * statistics[0] + 0.1 * data.x[rows].mean(0)
        statistics[1] = 0.9 * statistics[1] + 0.1 * data.x[rows].var(0)
    assert type(model[0]).__name__ == "AnyBatchNorm" or isinstance(model[0], nn.BatchNorm1d)
    torch.testing.assert_close(model[0].running_mean, (expected[0][0] + expected[1][0]) / 2)
    torch.testing.assert_close(model[0].running_var, (expected[0][1] + expected[1][1]) / 2)


def test_at_best_rate_uses_best_dropout_rate():
    errors = {f"dropout {r}": e for r, e in zip(pretrained.PAIRS["dropout"], (0.5, 0.2, 0.3, 0.9))}
    errors |= {f"bn {r}": e for r, e in zip(pretrained.PAIRS["bn"], (0.01, 0.15, 0.02, 0.03))}
    assert pretrained.at_best_rate(errors) == pytest.approx(0.05)
    for low, high in zip(pretrained.PAIRS["dropout"], pretrained.PAIRS["bn"]):
        assert float(high) == pytest.approx(5 * float(low))
    assert set(claims(["pretrained-rate"])[0].arms) == set(errors)


def test_embeddings_have_unit_norm_and_balanced_classes():
    data, test = resmlp.embeddings(0, 512)
    torch.testing.assert_close(data.x.norm(dim=1), torch.ones(512))
    assert 0.4 < float(data.y.double().mean()) < 0.6
    assert len(data) == len(test) == 512
    assert not torch.equal(data.x, test.x)


def test_mean_accuracy_reads_one_cell_of_matrix():
    def score(row, column, accuracy):
        return Score(row, column, 9, {"accuracy": accuracy})

    outcome = Outcome.__new__(Outcome)
    outcome.scores = {0: [score("own", "aggregated", 0.5), score("own", "recalibrated", 0.9)]}
    outcome.scores[1] = [score("own", "aggregated", 0.7), score("global", "aggregated", 0.1)]
    assert common.mean_accuracy(outcome, "own") == pytest.approx(0.6)
    assert common.mean_accuracy(outcome, "global") == pytest.approx(0.1)


def test_federated_is_deterministic():
    settings = {"scenario": "digits8", "partition": "natural", "rounds": 1}
    first, second = (normalizers.federated("groupnorm", 0, True, **settings) for _ in range(2))
    assert first == second
    assert set(first) == {"own test", "global test"}


# --- single quantities


def test_shift_of_translated_activations(monkeypatch):
    """Only a bias changes, by 0.01 per step: 0.1 in ten steps, divided by each unit's standard deviation."""
    data, _ = common.digits(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).requires_grad_(False)
    monkeypatch.setattr(batch_norm, "_mlp", lambda *_: model)

    def move_bias(model, data, order, optimizer, on_step):
        for _ in range(35):
            model[1].bias += 0.01
            on_step()

    monkeypatch.setattr(batch_norm, "train", move_bias)
    shift = batch_norm.shift("none", 0, True)["shift in ten steps"]
    std = model[:2](data.x[:256]).std(0)
    assert shift == pytest.approx(float((0.1 / std).mean()), rel=1e-4)


def test_mlp_weights_are_scaled_by_gain():
    plain, larger = (batch_norm._mlp("BN", 0, gain=g) for g in (1.0, 3.0))
    for a, b in zip(plain, larger):
        if isinstance(a, nn.Linear):
            torch.testing.assert_close(3 * a.weight, b.weight)


def test_accuracy_range_and_loss():
    values = {f"BN {g}": 0.9 for g in batch_norm.GAINS} | {"BN 10": 0.4, "BN 32": 0.95, "BN 2": 0.85}
    assert batch_norm.accuracy_range(values, "BN") == pytest.approx(0.5)
    assert batch_norm.accuracy_loss(values, "BN", "2") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arm", "names"),
    [
        ("before the ReLU", ["Conv2d", "BatchNorm2d", "ReLU"]),
        ("after the ReLU", ["Conv2d", "ReLU", "BatchNorm2d"]),
        ("before the convolution", ["BatchNorm2d", "Conv2d", "ReLU"]),
        ("nowhere", ["Conv2d", "ReLU", "MaxPool2d"]),
    ],
)
def test_placement_of_bn(arm, names, monkeypatch):
    models = []
    monkeypatch.setattr(batch_norm, "train", lambda model, *_: models.append(model))
    batch_norm.placement(arm, 0, True)
    assert [type(m).__name__ for m in models[0]][:3] == names


def test_summary_uses_second_half_of_errors():
    summary = diminishing._summary([0.9, 0.8, 0.1, 0.3])
    assert summary["error"] == 0.3
    assert summary["spread over epochs"] == pytest.approx(math.sqrt(0.02))


def test_with_best_weight_minimizes_held_out_loss():
    held_out = linear(40)
    torch.manual_seed(1)
    model = SmallCNN((1, 8, 8), 2)
    selected = evalnorm.with_best_weight(model, held_out)
    candidates = {w: convert(copy.deepcopy(model), "iew", w=w).eval() for w in evalnorm.WEIGHTS}
    losses = {w: float(nn.functional.cross_entropy(m(held_out.x), held_out.y)) for w, m in candidates.items()}
    assert {m.w for m in selected.modules() if hasattr(m, "w")} == {min(losses, key=losses.get)}


def test_evaluate_batches_equals_training_on_full_batch():
    """With a single batch of all data, loss and activations equal those in training."""
    data = linear(700)
    torch.manual_seed(0)
    model = SmallCNN((1, 8, 8), 2)
    loss, accuracy, activations = evalnorm._evaluate_batches(model, data, 700, 0)
    out, expected = evalnorm._forward_with_activations(copy.deepcopy(model).train(), data.x)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(out, data.y)), rel=1e-5)
    assert accuracy == float((out.argmax(1) == data.y).double().mean())
    assert len(expected) == 2
    # Not exactly equal: the rows have another order, and quantiles use every seventh value.
    assert max(evalnorm.distance(activations[k], expected[k]) for k in expected) < 0.05
    assert min(evalnorm.distance(activations[k], expected[k] + 0.2) for k in expected) > 0.15


def test_gradient_error_shrinks_for_full_norm_only():
    errors = [full_norm.gradient_error(arm, 0, True)["gradient error"] for arm in ("FN 0.3", "FN 0.03", "BN 0.03")]
    assert errors[1] < errors[0] / 3
    assert errors[2] > 0.5


@pytest.mark.slow
def test_gradients_of_fedtan_are_exact():
    exact = fedtan.gradients("fedtan sorted", 0, True)
    naive = fedtan.gradients("global-naive sorted", 0, True)
    assert max(exact.values()) < 1e-4
    assert min(naive.values()) > 0.1
    assert set(exact) == {f"gradient deviation: fedtan sorted {i}" for i in fedtan.LAYERS}


@pytest.mark.parametrize(("model", "exchanges"), [("mlp", 4), ("small-cnn", 7)])
def test_cost_counts_exchanges(model, exchanges):
    cost = fedtan.cost(model, 0, True)
    assert (cost["exchanges"], cost["exchanges beyond 3L+1"]) == (exchanges, 0)
    channels = {"mlp": 32, "small-cnn": 24}[model]
    entries = {"mlp": 64 * 32 + 32 + 5 * 32 - 32 + 32 * 10 + 10, "small-cnn": 72 + 1152 + 4 * 24 + 650}[model]
    # Mean, variance and two gradients per channel; batch counters are not sent.
    assert cost["share of the model"] == pytest.approx(4 * channels / entries, rel=0.05)


def test_growth_follows_law():
    growth = {arm: binary.growth(arm, 0, True)["growth per layer"] for arm in ("none", "bn")}
    assert growth["none"] == pytest.approx(binary.LAW, rel=0.05)
    assert growth["bn"] == pytest.approx(math.sqrt(0.683), rel=0.05)


def test_mean_gain_filters_settings_by_keywords():
    values = {f"{n} @ {s}": 0.5 for n in ("GN", "BN") for s in normalizers.SETTINGS}
    values |= {"GN @ small-cnn labels 4": 0.9, "GN @ mlp labels 32": 0.7, "GN @ mlp iid 32": 0.1}
    assert normalizers.mean_gain(values, "GN", "BN", "labels") == pytest.approx(0.6 / 4)
    assert normalizers.mean_gain(values, "GN", "BN", "labels", "mlp", "32") == pytest.approx(0.2)
    assert len(normalizers.SETTINGS) == 12
    assert len(claims(["grid-labels"])[0].arms) == 6 * 12 - 6


def test_grid_runs():
    assert 0 < normalizers.grid("IN @ small-cnn iid 32", 0, True)["accuracy"] <= 1


@pytest.mark.slow
def test_transfer_trains_expected_modules(monkeypatch):
    few = {d: tuple(e.take(torch.arange(100)) for e in pair) for d, pair in common.digit_domains().items()}
    monkeypatch.setattr(pretrained, "digit_domains", lambda: few)
    trained = []
    fit = pretrained._fit
    monkeypatch.setattr(pretrained, "_fit", lambda model, *rest: trained.append(model) or fit(model, *rest))
    errors = pretrained.transfer("elsewhere", 0, True)
    assert [type(m).__name__ for m in trained] == ["AlexNetCvgj", "Linear", "AlexNetCvgj"]
    assert set(errors) | {"error: from scratch"} == {f"error: {arm}" for arm in pretrained.VARIANTS}


def test_hapt_table_tests_unseen_people():
    data, test = resmlp._table("hapt", 0)
    population = scenario("hapt").load(0)
    assert len(test) == sum(len(population.users[i].train) for i in population.unseen)
    assert data.x.shape[1] == 30
    assert float(data.x.mean(0).abs().max()) < 1e-4
    rows = {r.numpy().tobytes() for r in data.x}
    assert sum(r.numpy().tobytes() in rows for r in test.x) < len(test) / 100


def test_table_is_split_and_standardized():
    data, test = resmlp._table("wine", 1)
    assert len(data) + len(test) == 178
    assert float(data.x.std(0).sub(1).abs().max()) < 1e-4
    assert not torch.equal(resmlp._table("wine", 2)[1].y, test.y)


def test_gain_over_classical_uses_best_method():
    values = dict.fromkeys((*stroke.NETWORKS, *stroke.CLASSICAL), 0.5) | {"SVM": 0.7, "bn 20": 0.8}
    assert stroke.gain_over_classical(values) == pytest.approx(0.1)


def test_left_out_uses_one_fold_per_subject_at_full_size(monkeypatch):
    num_folds = []
    monkeypatch.setattr(stroke, "network", lambda norm, epochs, cohort, k, seed: num_folds.append(k) or {5: (0.5, 0.4)})
    assert stroke.left_out("none", 0, False) == {"accuracy: none 5": 0.5, "F-score: none 5": 0.4}
    stroke.left_out("bn", 0, True)
    assert num_folds == [62, 5]


def test_network_intermediate_score_equals_shorter_training():
    subjects = stroke.cohort(8, 4, 0)
    both, short = (stroke.network("bn", epochs, subjects, 4, 1) for epochs in ((2, 4), (2,)))
    assert both[2] == short[2]
    assert set(both) == {2, 4}


@pytest.mark.slow
def test_classical_tests_on_unseen_subjects():
    """Labels that can only be predicted by memorizing a subject: accuracy must be near chance."""
    rng = torch.Generator().manual_seed(0)
    subject = torch.arange(20).repeat_interleave(6)
    y = torch.randint(2, (20,), generator=rng)[subject]
    x = torch.randn(20, 1, 24, generator=rng)[subject] + 0.01 * torch.randn(120, 1, 24, generator=rng)
    cohort = stroke.Cohort(x, y, subject)
    for accuracy, f_score in stroke.classical(cohort, 20, 0).values():
        assert accuracy < 0.8
        assert 0 <= f_score <= 1


# --- alignment of a sensor


def test_quick_alignment_has_a_part_of_every_stream():
    population = scenario("imu:users=4:unseen=1").load(0)
    thinned = alignment._thinned(population)
    for whole, part in zip(population.users, thinned.users, strict=True):
        assert torch.equal(part.test.x, whole.test.x[:: alignment.THINNED])
        assert torch.equal(part.train.x, whole.train.x)
    assert thinned.unseen == population.unseen


@pytest.mark.slow
@pytest.mark.parametrize("run", [alignment.phone, alignment.watch])
def test_alignment_study_measures_all_arms_of_its_claims(run):
    measured = run("federated", 0, True)
    arms = {f"accuracy: {arm}" for claim in alignment.CLAIMS if claim.run is run for arm in claim.arms}
    assert set(measured) == arms
    assert all(0 <= value <= 1 for value in measured.values())
