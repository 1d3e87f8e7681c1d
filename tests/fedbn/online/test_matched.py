import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from fedbn.errors import UserError
from fedbn.nn.inference import logits
from fedbn.online import Matched, fit_matched_head, personalize
from fedbn.online.matched import served_features
from fedbn.online.sums import LabeledWindows, sums_of_users

CLASSES = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, CLASSES)).eval()


@pytest.fixture(scope="module")
def users():
    draw = torch.Generator().manual_seed(1)
    labels = [torch.arange(40) % CLASSES, torch.arange(30) % 2]
    centers = 2 * torch.randn(CLASSES, 5, generator=draw)
    return [(centers[y] + torch.randn(len(y), 5, generator=draw), y) for y in labels]


@pytest.fixture(scope="module")
def head(model, users):
    return fit_matched_head(model, users, CLASSES)


def test_head_is_linear_discriminant_analysis_of_all_features(model, users, head):
    x, y = (torch.cat(part) for part in zip(*users, strict=True))
    features = served_features(model, x).double()
    means = torch.stack([features[y == k].mean(0) for k in range(CLASSES)])
    cov = torch.cov((features - means[y]).T, correction=0)
    cov = 0.95 * cov + 0.05 * cov.trace() / 4 * torch.eye(4)
    found = head.mix(features, torch.zeros(len(x), CLASSES).double()).softmax(1)
    oracle = LinearDiscriminantAnalysis(store_covariance=True)
    oracle.fit(features.numpy(), y.numpy())
    # Without shrinkage scikit-learn computes the same classifier.
    exact = fit_matched_head(model, users, CLASSES, Matched(weight=math.inf, shrink=1e-9))
    proba = torch.from_numpy(oracle.predict_proba(features.numpy()))
    assert torch.allclose(exact.mix(features, features).softmax(1), proba, atol=0.02)
    assert torch.allclose(head.weight, torch.linalg.solve(cov, means.T).T)
    assert found.shape == proba.shape


def test_mix_adds_weighted_log_probabilities(head):
    features, out = torch.randn(6, 4), torch.randn(6, CLASSES)
    own = (features @ head.weight.float().T + head.bias.float()).log_softmax(1)
    assert torch.allclose(head.mix(features, out), 0.1 * own + out.log_softmax(1), atol=1e-5)


def test_sums_do_not_depend_on_how_windows_are_spread_over_clients(model, users, head):
    x, y = (torch.cat(part) for part in zip(*users, strict=True))
    together = fit_matched_head(model, [(x, y)], CLASSES)
    assert torch.allclose(together.weight, head.weight)
    assert torch.allclose(together.bias, head.bias)


def test_personalized_model_mixes_the_head_with_the_adapted_network(model, users, head):
    plain, mixed = personalize(model, "pseudo:n0=4"), personalize(model, "pseudo:n0=4", head=head)
    x = users[0][0]
    for row in x.split(1):
        out, adapted = plain.predict(row, user="ann"), mixed.predict(row, user="ann")
        assert torch.allclose(adapted, head.mix(served_features(model, row), out), atol=1e-5)
        plain.commit()
        mixed.commit()
    assert not torch.allclose(plain.predict(x[:1], user="ann"), logits(model, x[:1]))
    assert mixed.state("ann").rule == plain.state("ann").rule


def test_infinite_weight_is_the_head_alone(model, users):
    head = fit_matched_head(model, users, CLASSES, "matched:weight=inf")
    net, x = personalize(model, "ema", head=head), users[1][0]
    before = net.predict(x, user="ann")
    net.commit()
    assert torch.equal(net.predict(x, user="ann"), before)
    assert torch.allclose(before, head.mix(served_features(model, x), before), atol=1e-6)


def test_classes_that_nobody_has_are_never_the_answer(model, users):
    head = fit_matched_head(model, users[1:], CLASSES, "matched:weight=inf")
    assert (head.mix(served_features(model, users[0][0]), torch.zeros(40, CLASSES)).argmax(1) < 2).all()


def test_noise_on_the_sums_leaves_a_valid_head(model, users):
    total = Matched().client_sums(model, LabeledWindows(*users[0], CLASSES), {})
    noised = {k: v + 30 * torch.randn(v.shape, generator=torch.Generator().manual_seed(3)) for k, v in total.items()}
    assert all(v.isfinite().all() for v in Matched().from_sums(noised).values())


@pytest.mark.parametrize(
    ("text", "message"),
    [("matched:weight=-1", "weight=-1 is out of range"), ("matched:shrink=0", "shrink=0 is out of range")],
)
def test_options_out_of_range_are_refused(text, message, model, users):
    with pytest.raises(UserError, match=message):
        fit_matched_head(model, users, CLASSES, text)


def test_models_without_a_linear_last_layer_are_refused(users):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Unflatten(1, (5, 1)), nn.Conv1d(5, CLASSES, 1), nn.Flatten())
    with pytest.raises(UserError, match="replaces a linear last layer"):
        fit_matched_head(model, users, CLASSES)
    with pytest.raises(UserError, match="pass at least one user"):
        fit_matched_head(model, [], CLASSES)


def test_a_mixed_model_is_not_exported(model, head):
    with pytest.raises(UserError, match="cannot align its input or mix two heads"):
        personalize(model, "pseudo", head=head).export("ann")


def test_sums_without_labels_are_refused(model):
    empty = LabeledWindows(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), CLASSES)
    with pytest.raises(UserError, match="none has any"):
        sums_of_users(Matched(), model, [empty])
