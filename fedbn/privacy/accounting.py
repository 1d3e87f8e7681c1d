"""Renyi differential privacy accounting of the Gaussian mechanism."""

from __future__ import annotations

import warnings

from fedbn.errors import UserError

ORDERS = (1.001, 1.005, 1.01, 1.02, *(1 + x / 20 for x in range(1, 100)), *range(6, 64), 128, 256, 512)
"""Renyi orders among which the accountant looks for the best."""


def epsilon(multiplier: float, releases: int, delta: float) -> float:
    """Epsilon of Gaussian releases, by Opacus' Renyi accountant.

    Args:
        multiplier: standard deviation of the noise over the L2 sensitivity of one release.
        releases: how many, about the same user.
        delta: as in (epsilon, delta)-differential privacy.

    Raises:
        UserError: the accountant is not installed.
    """
    try:
        from opacus.accountants.analysis import rdp
    except ImportError:
        raise UserError("accounting for noise needs Opacus: pip install 'fedbn[privacy]'") from None
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=multiplier, steps=releases, orders=list(ORDERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an order at the edge gives a looser bound, which is still one
        return float(rdp.get_privacy_spent(orders=list(ORDERS), rdp=spent, delta=delta)[0])
