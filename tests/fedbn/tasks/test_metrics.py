"""Metrics compared with torchmetrics and scikit-learn, and losses with their definitions."""

from __future__ import annotations

import pytest
import torch
import torchmetrics.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, r2_score, roc_auc_score
from torch.nn import functional as F

from fedbn.errors import UserError
from fedbn.tasks.classification import Classification
from fedbn.tasks.metrics import ranking
from fedbn.tasks.multilabel import MultiLabel
from fedbn.tasks.regression import Regression
from fedbn.tasks.segmentation import Segmentation
from fedbn.tasks.sequence import SequenceLabels


def drawn(n=40, classes=4):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=draw) * 2, torch.randint(0, classes, (n,), generator=draw)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_ranking_equals_scikit_learn_with_ties_and_padding(pairs, padding):
    scores, positive = (torch.tensor(values) for values in zip(*pairs, strict=True))
    n = len(scores)
    padded = F.pad(scores.float(), (0, padding), value=9.0), F.pad(positive, (0, padding), value=True)
    area, precision = ranking(*(t[None] for t in padded), (torch.arange(n + padding) < n)[None])
    if positive.any():
        assert float(precision) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    if positive.any() and not positive.all():
        assert float(area) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    else:
        assert area.isnan()


def test_classification_metrics_equal_torchmetrics():
    outputs, y = drawn()
    found, p = Classification().scores(outputs, y), outputs.double().softmax(1)
    of = reference.classification
    expected = {
        "accuracy": of.multiclass_accuracy(p, y, 4, average="micro"),
        "macro_f1": of.multiclass_f1_score(p, y, 4),
        "balanced_accuracy": of.multiclass_accuracy(p, y, 4, average="macro"),
        "auroc": of.multiclass_auroc(p, y, 4),
        "average_precision": of.multiclass_average_precision(p, y, 4),
        "ece": of.multiclass_calibration_error(p, y, 4, n_bins=15),
    }
    assert found == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)


def test_classification_metrics_of_absent_classes():
    outputs, y = drawn(n=12, classes=5)
    y = y.clamp(max=1)
    found = Classification().scores(outputs, y)
    assert found["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(y, outputs.argmax(1)) if set(outputs.argmax(1).tolist()) else 0
    )
    p = outputs.double().softmax(1)
    assert found["auroc"] == pytest.approx(sum(roc_auc_score(y == c, p[:, c]) for c in (0, 1)) / 2)
    assert "auroc" not in Classification().scores(outputs, torch.zeros_like(y))


def test_multilabel_metrics_equal_torchmetrics():
    outputs, y = drawn()[0], (torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    of, p = reference.classification, outputs.sigmoid()
    expected = {
        "macro_f1": of.multilabel_f1_score(p, y, 4),
        "accuracy": of.multilabel_accuracy(p, y, 4),
        "exact_match": of.multilabel_exact_match(p, y, 4),
        "auroc": of.multilabel_auroc(p, y.long(), 4),
        "average_precision": of.multilabel_average_precision(p, y.long(), 4),
    }
    assert MultiLabel().scores(outputs, y) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)


@pytest.mark.parametrize("shape", [(30,), (30, 2)])
def test_regression_metrics_are_in_units_of_the_targets(shape):
    draw = torch.Generator().manual_seed(0)
    y = 40 + 12 * torch.randn(shape, generator=draw)
    task = Regression().fit(y, ())
    outputs = torch.randn(30, task.output_shape(y, ())[0], generator=draw)
    predicted = (outputs.double() * y.double().std(0, correction=0) + y.double().mean(0)).view(shape)
    found = task.scores(outputs, y)
    assert found["mae"] == pytest.approx(float((predicted - y).abs().mean()))
    assert found["rmse"] == pytest.approx(float(((predicted - y) ** 2).mean().sqrt()))
    assert found["r2"] == pytest.approx(r2_score(y, predicted))


@pytest.mark.parametrize(("loss", "reference"), [("mse", F.mse_loss), ("mae", F.l1_loss), ("huber", F.huber_loss)])
def test_regression_loss_is_that_of_torch_on_standardized_targets(loss, reference):
    y = torch.tensor([1.0, 3.0, 8.0])
    task, outputs = Regression(loss_=loss, center=(3.0,), scale=(2.0,)), torch.tensor([[0.0], [1.0], [-1.0]])
    assert task.loss(outputs, y) == pytest.approx(float(reference(outputs[:, 0], (y - 3) / 2)))
    assert task.fit(y, ()) == task


def test_classification_weights_scale_the_loss_of_their_class():
    outputs, y = drawn(n=6, classes=2)
    weighted = Classification(weights=(1.0, 3.0)).losses(outputs, y)
    torch.testing.assert_close(weighted, F.cross_entropy(outputs, y, reduction="none") * torch.tensor([1.0, 3.0])[y])
    balanced = Classification(balanced=True).fit(torch.tensor([0] * 9 + [1] * 3), ("a", "b"))
    assert balanced.weights == pytest.approx((12 / 18, 12 / 6))


def test_classification_smoothing_is_that_of_torch():
    outputs, y = drawn()
    expected = F.cross_entropy(outputs, y, label_smoothing=0.1)
    torch.testing.assert_close(Classification(smoothing=0.1).loss(outputs, y), expected)
    torch.testing.assert_close(Classification(smoothing=0.1).losses(outputs, y).mean(), expected)


def test_multilabel_balanced_weights_are_negatives_per_positive():
    y = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert MultiLabel(balanced=True).fit(y, ()).weights == pytest.approx((1 / 3, 3.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(smoothing=1.0), "smoothing must be at least 0 and below 1"),
        (lambda: Classification(weights=(1.0, 0.0)), "weights must be positive"),
        (lambda: MultiLabel(weights=(-1.0,)), "weights must be positive"),
        (lambda: Regression(delta=0.0), "delta must be positive"),
        (lambda: Regression(scale=(0.0,)), "scale must be positive"),
    ],
)
def test_task_options_out_of_bounds_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_segmentation_metrics_equal_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(6, 3, 4, 5, generator=draw), torch.randint(0, 3, (6, 4, 5), generator=draw)
    y[0, 0] = -100
    of, valid = reference.classification, y != -100
    p = outputs.argmax(1)[valid], y[valid]
    expected = {
        "dice": of.multiclass_f1_score(*p, 3),
        "iou": of.multiclass_jaccard_index(*p, 3),
        "accuracy": of.multiclass_accuracy(*p, 3, average="micro"),
    }
    assert Segmentation().scores(outputs, y) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)
    without = Segmentation(background=False).scores(outputs, y)["dice"]
    assert without == pytest.approx(float(of.multiclass_f1_score(*p, 3, average=None)[1:].mean()), abs=1e-6)


def test_segmentation_dice_loss_is_low_for_the_right_map_and_ignores_masked_positions():
    y = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    right = F.one_hot(y, 3).movedim(3, 1) * 20.0
    task = Segmentation(loss_="dice")
    assert task.losses(right, y).max() < 1e-3 < 0.5 < task.losses(right.roll(1, 1), y).min()
    masked = y.clone()
    masked[:, :4] = -100
    changed = right.clone()
    changed[:, :, :4] = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(task.losses(changed, masked), task.losses(right, masked))
    both = Segmentation(loss_="both").losses(right, y)
    torch.testing.assert_close(both, task.losses(right, y) + Segmentation().losses(right, y))


@pytest.mark.parametrize("kind", [Segmentation, SequenceLabels])
def test_position_loss_is_the_mean_over_positions_that_count(kind):
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 3, 4, 1, generator=draw)[..., 0] if kind is SequenceLabels else torch.randn(3, 3, 2, 2)
    y = torch.randint(0, 3, (3, *outputs.shape[2:]), generator=draw)
    y[0].view(-1)[1:] = -100
    y[1] = -100
    losses = kind().losses(outputs, y)
    assert losses[0] == pytest.approx(float(F.cross_entropy(outputs[:1].flatten(2)[..., 0], y[0].view(-1)[:1])))
    assert losses[1] == 0
    assert losses[2] == pytest.approx(float(F.cross_entropy(outputs[2:], y[2:])))
