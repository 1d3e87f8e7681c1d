"""Metrics of tasks as functions of tensors, for many users at once.

The same values as those of torchmetrics and scikit-learn, which are the oracles of the tests. Their import takes more
than a second and their input checks milliseconds, which would dominate the evaluation of thousands of clients.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15
"""Bins of the expected calibration error."""


def mean_f1(correct: Tensor, occurring: Tensor) -> Tensor:
    """Mean F1 over the classes that occur or are predicted; the classes are on the last axis.

    Args:
        correct: number of correct predictions of each class.
        occurring: number of labels plus number of predictions of each class.

    >>> float(mean_f1(torch.tensor([1, 1, 0]), torch.tensor([3, 3, 0])))
    0.6666666666666666
    """
    return (2 * correct.double() / occurring.clamp_min(1)).sum(-1) / (occurring > 0).sum(-1)


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the last axis of the values in ``where``; NaN if there are none.

    >>> mean_over(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return torch.where(where, values, 0).sum(-1) / where.sum(-1)


def calibration_error(confidence: Tensor, correct: Tensor, valid: Tensor) -> Tensor:
    r"""Expected calibration error: :math:`\sum_b \frac{n_b}{n}|acc_b-conf_b|` over `BINS` bins of equal width.

    Guo, Pleiss, Sun, Weinberger, 2017, https://arxiv.org/abs/1706.04599

    Args:
        confidence: probabilities ``[K, B]`` of the predicted classes.
        correct: whether the predictions are correct, ``[K, B]``.
        valid: which examples are not padding, ``[K, B]``.

    >>> calibration_error(torch.tensor([[0.9, 0.9]]), torch.tensor([[True, False]]), torch.tensor([[True, True]]))
    tensor([0.4000])
    """
    index = (confidence * BINS).long().clamp(0, BINS - 1)
    gap = torch.where(valid, correct.to(confidence) - confidence, 0)
    sums = torch.zeros(len(gap), BINS, dtype=gap.dtype, device=gap.device).scatter_add(1, index, gap)
    return sums.abs().sum(1) / valid.sum(1)


def ranking(scores: Tensor, positive: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Area under the ROC curve and average precision, ``[R]`` each; NaN where undefined.

    Equal scores share their mean rank (Hanley and McNeil, 1982) and their precision. Average precision needs a
    positive, the area also a negative.

    Args:
        scores: ``[R, B]``, higher for positives.
        positive: ``[R, B]``.
        valid: which entries are not padding, ``[R, B]``.

    >>> area, precision = ranking(torch.tensor([[0.1, 0.4, 0.8]]), torch.tensor([[False, True, True]]),
    ...     torch.tensor([[True, True, True]]))
    >>> float(area), float(precision)
    (1.0, 1.0)
    """
    ordered, index = scores.double().masked_fill(~valid, torch.inf).sort(1)
    hits = (positive & valid).gather(1, index).double()
    below = torch.searchsorted(ordered, ordered)
    up_to = torch.searchsorted(ordered, ordered, right=True)
    n, positives = valid.sum(1, keepdim=True), hits.sum(1, keepdim=True)
    negatives = n - positives
    ranks = (hits * (below + up_to + 1) / 2).sum(1, keepdim=True)
    area = (ranks - positives * (positives + 1) / 2) / (positives * negatives)
    hits_below = torch.cat([torch.zeros_like(positives), hits.cumsum(1)], 1).gather(1, below)
    precision = (hits * (positives - hits_below) / (n - below).clamp_min(1)).sum(1, keepdim=True) / positives
    usable = torch.where(valid, scores, 0).isfinite().all(1)
    area, precision = (torch.where(usable, value[:, 0], torch.nan) for value in (area, precision))
    return torch.where(negatives[:, 0] > 0, area, torch.nan), precision


def defined(**values: Tensor) -> dict[str, float]:
    """The values that are not NaN, as numbers.

    >>> defined(auroc=torch.tensor(torch.nan), accuracy=torch.tensor(0.5))
    {'accuracy': 0.5}
    """
    return {name: float(value) for name, value in values.items() if not value.isnan()}
