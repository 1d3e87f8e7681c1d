"""Metrics of tasks as functions of tensors, for many users at once.

The same values as those of torchmetrics and scikit-learn, which are the oracles of the tests. Their import takes more
than a second and their input checks milliseconds, which would dominate the evaluation of thousands of clients.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

BINS = 15
"""Bins of the expected calibration error."""

_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


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
    values, mask, positives = scores.float().cpu().numpy(), valid.cpu().numpy(), (positive & valid).cpu().numpy()
    rows, width = values.shape
    # Whole numbers in the order of the scores, positives last among equal ones, and by row: they sort several times
    # faster, and one search finds the places of all positives.
    bits = (np.where(mask, values, np.inf) + np.float32(0)).astype(np.float32).view(np.int32)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    ordered = (np.sort(2 * bits + positives, axis=1) + (np.arange(rows)[:, None] << 34)).ravel()
    place, groups = np.flatnonzero(ordered & 1), ordered >> 1
    row, own = place // width, groups[place]
    below, up_to = (np.searchsorted(groups, own, side) - row * width for side in _SIDES)
    n, p = mask.sum(1), np.bincount(row, minlength=rows)
    hits_below = np.searchsorted(own, own) - (p.cumsum() - p)[row]
    with np.errstate(divide="ignore", invalid="ignore"):
        ranks = np.bincount(row, (below + up_to + 1) / 2, rows)
        area = (ranks - p * (p + 1) / 2) / (p * (n - p))
        precision = np.bincount(row, (p[row] - hits_below) / (n[row] - below), rows) / p
    unusable = ~(np.isfinite(values) | ~mask).all(1)
    area[unusable | (p == n)] = precision[unusable] = np.nan
    return torch.from_numpy(area).to(scores.device), torch.from_numpy(precision).to(scores.device)


def defined(**values: Tensor) -> dict[str, float]:
    """The values that are not NaN, as numbers.

    >>> defined(auroc=torch.tensor(torch.nan), accuracy=torch.tensor(0.5))
    {'accuracy': 0.5}
    """
    return {name: float(value) for name, value in values.items() if not value.isnan()}
