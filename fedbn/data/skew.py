"""PLACEHOLDER until the real module replaces this file (whoever writes skew.py: overwrite it whole).

The names that simulations/compare.py uses: measure(population).as_dict(), statistics_distance(means, variances).
"""

import numpy as np


class _Nothing:
    def as_dict(self):
        return {"label_divergence": 0.0, "quantity_cv": 0.0, "feature_w2": None}


def measure(population):
    """Measured skew of a population."""
    return _Nothing()


def statistics_distance(means, variances):
    """Pairwise W2 distance [users, users] from per-user [channels] means and variances of one layer."""
    points = np.concatenate([np.stack(means), np.sqrt(np.stack(variances))], axis=1)
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
