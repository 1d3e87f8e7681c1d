"""Measure the skew between users: in labels, quantity, inputs and BN statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from fedbn.data.population import Population

READ_ROWS = 4096
"""Rows that are read at once."""


@dataclass(frozen=True)
class Skew:
    """Skew between the training data of the seen users.

    Attributes:
        label_divergence: mean Jensen-Shannon divergence, in bits, between a user's label distribution and the pooled
            one; 0 for equal distributions, at most 1; NaN if examples have no class.
        quantity_cv: coefficient of variation of the users' example counts (standard deviation over mean).
        quantity_ratio: largest over smallest example count.
        feature_w2: mean over pairs of users of the 2-Wasserstein distance between diagonal Gaussians fitted to the raw
            channels, in units of each channel's pooled standard deviation.
    """

    label_divergence: float
    quantity_cv: float
    quantity_ratio: float
    feature_w2: float

    def as_dict(self) -> dict[str, float]:
        """The values as a dict."""
        return asdict(self)


def _jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions in bits.

    >>> _jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    1.0
    """
    # scipy.spatial, which has its square root, is slow to import.
    middle = (p + q) / 2
    return float((scipy.special.rel_entr(p, middle) + scipy.special.rel_entr(q, middle)).sum() / (2 * np.log(2)))


def measure(population: Population) -> Skew:
    """Measure the skew between the seen users of a population."""
    users = [population.users[i] for i in population.seen]
    classes = max(1, len(population.classes))
    counts = np.stack([np.bincount(u.train.groups.cpu().numpy(), minlength=classes) for u in users])
    sizes = counts.sum(1)
    pooled = counts.sum(0) / counts.sum()
    divergence = [_jensen_shannon(c / c.sum(), pooled) for c in counts]
    moments = [_channel_moments(u.train.x) for u in users]
    means, variances = (np.stack(values) for values in zip(*moments, strict=True))
    share = (sizes / sizes.sum())[:, None]
    total = (share * (variances + (means - (share * means).sum(0)) ** 2)).sum(0)
    unit = np.sqrt(np.where(total > 0, total, 1.0))
    distance = statistics_distance(means / unit, variances / unit**2)
    pairs = distance[np.triu_indices(len(users), 1)]
    return Skew(
        float(np.mean(divergence)) if users[0].train.has_classes else float("nan"),
        float(sizes.std() / sizes.mean()),
        float(sizes.max() / max(sizes.min(), 1)),
        float(pairs.mean()) if len(pairs) else 0.0,
    )


def _channel_moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel of ``[n, channels, ...]``, in parts, because data may not fit in memory."""
    others = [a for a in range(x.dim()) if a != 1]
    count = x.numel() / max(1, x.shape[1])

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([of(part.double()).sum(others) for part in x.split(READ_ROWS)]).sum(0) / count

    center = mean(lambda part: part)
    shape = [-1 if a == 1 else 1 for a in range(x.dim())]
    variance = mean(lambda part: (part - center.view(shape)) ** 2)
    return center.cpu().numpy(), variance.cpu().numpy()


def statistics_distance(
    means: Sequence[np.ndarray] | np.ndarray, variances: Sequence[np.ndarray] | np.ndarray
) -> np.ndarray:
    """Pairwise 2-Wasserstein distance ``[users, users]`` between diagonal Gaussians.

    Args:
        means: ``[users, channels]``.
        variances: ``[users, channels]``, non-negative.

    >>> statistics_distance([[0.0], [3.0]], [[1.0], [25.0]])[0, 1]
    np.float64(5.0)
    """
    points = np.concatenate([np.asarray(means), np.sqrt(np.asarray(variances))], axis=1)
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
