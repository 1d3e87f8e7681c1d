"""Metrics of tasks as functions of tensors, for many users at once.

The same values as those of torchmetrics and scikit-learn, which are the oracles of the tests. Their import takes more
than a second and their input checks milliseconds, which would dominate the evaluation of thousands of clients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BINS = 15
"""Bins of the expected calibration error."""


def mean_f1(correct: Tensor, occurring: Tensor) -> Tensor:
    """Mean F1 over the classes that occur or are predicted; the classes are on the last axis.

    Args:
        correct: number, or sum of weights, of correct predictions of each class.
        occurring: that of labels plus that of predictions of each class.

    >>> float(mean_f1(torch.tensor([1, 1, 0]), torch.tensor([3, 3, 0])))
    0.6666666666666666
    """
    seen = occurring > 0
    return (2 * correct.double() / torch.where(seen, occurring, 1)).sum(-1) / seen.sum(-1)


def count_classes(classes: Tensor, where: Tensor, number: int) -> Tensor:
    """How often each class occurs, ``[K, number]``.

    Args:
        classes: class indices ``[K, ...]``.
        where: which of them count, ``[K, ...]``.
        number: number of classes.

    >>> count_classes(torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[True, True, False], [True, True, True]]), 2)
    tensor([[1, 1],
            [2, 1]])
    """
    if len(classes) > 1:
        classes = classes + number * torch.arange(len(classes)).to(classes).view(-1, *[1] * (classes.dim() - 1))
    return torch.bincount(classes[where], minlength=len(where) * number).view(-1, number)


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
    index = (confidence * BINS).long().clamp_(0, BINS - 1)
    gap = torch.where(valid, correct.to(confidence) - confidence, 0)
    cells = index + BINS * torch.arange(len(index), device=index.device)[:, None]
    sums = torch.bincount(cells.flatten(), gap.flatten(), BINS * len(index)).view(-1, BINS)
    return sums.abs().sum(1) / valid.sum(1)


def ranking(scores: Tensor, positive: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Area under the ROC curve and average precision, ``[...]`` each; NaN where undefined.

    Equal scores share their mean rank (Hanley and McNeil, 1982) and their precision. Average precision needs a
    positive, the area also a negative.

    Args:
        scores: ``[..., B]``, higher for positives.
        positive: ``[..., B]``.
        valid: which entries are not padding; its shape is expanded to that of ``scores``.

    >>> area, precision = ranking(torch.tensor([[0.1, 0.4, 0.8]]), torch.tensor([[False, True, True]]),
    ...     torch.tensor([[True, True, True]]))
    >>> float(area), float(precision)
    (1.0, 1.0)
    """
    values, mask = scores.float().cpu().numpy(), valid.expand(scores.shape).cpu().numpy()
    positives, shape, width = (positive & valid).cpu().numpy(), scores.shape[:-1], scores.shape[-1]
    rows = shape.numel()
    # Whole numbers in the order of the scores, positives last among equal ones: they sort many times faster.
    bits = (np.where(mask, values, np.float32(np.inf)) + np.float32(0)).view(np.uint32)
    if (values >= 0).all():
        keys = bits << 1 | positives
    else:
        signed = bits.view(np.int32)
        keys = 2 * (signed ^ ((signed >> 31) & 0x7FFFFFFF)).astype(np.int64) + positives
    keys = np.sort(keys.reshape(rows, width), axis=1)
    n, p = mask.reshape(rows, width).sum(1), positives.reshape(rows, width).sum(1)
    row, place = np.nonzero(keys & 1)
    own = keys[row, place]
    # Positives with equal scores are neighbors; `first` is the index of the first of them among all positives.
    differs = (own[1:] != own[:-1]) | (row[1:] != row[:-1])
    first = np.concatenate([np.arange(min(1, len(own))), np.flatnonzero(differs) + 1])
    size = np.concatenate([first[1:], [len(own)]]) - first if len(own) else first
    row, below, own = row[first], place[first], own[first]
    up_to, hits_below = below + size, first - (p.cumsum() - p)[row]
    tied = (below > 0) & (keys[row, below - 1] == own - 1)  # with negatives
    if tied.any():
        ordered, offset = keys + (np.arange(rows)[:, None] << 34), row[tied] << 34
        below[tied] = np.searchsorted(ordered.ravel(), own[tied] - 1 + offset) - width * row[tied]
    with np.errstate(divide="ignore", invalid="ignore"):
        ranks = np.bincount(row, size * (below + up_to + 1) / 2, rows)
        area = (ranks - p * (p + 1) / 2) / (p * (n - p))
        precision = np.bincount(row, size * (p[row] - hits_below) / (n[row] - below), rows) / p
    unusable = ~(np.isfinite(values) | ~mask).all(-1).ravel()
    area[unusable | (p == n)] = precision[unusable] = np.nan
    area, precision = area.reshape(shape), precision.reshape(shape)
    return torch.from_numpy(area).to(scores.device), torch.from_numpy(precision).to(scores.device)
