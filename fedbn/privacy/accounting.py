"""Renyi differential privacy accounting of the Gaussian mechanism."""

from __future__ import annotations

import warnings

from fedbn.errors import UserError, install_extra

ORDERS = (1.001, 1.005, 1.01, 1.02, *(1 + x / 20 for x in range(1, 100)), *range(6, 64), 128, 256, 512)
"""Renyi orders over which the accountant minimizes epsilon."""


def epsilon(multiplier: float, releases: int, delta: float) -> float:
    """Epsilon of Gaussian releases, by Opacus' Renyi accountant.

    Args:
        multiplier: standard deviation of the noise over the L2 sensitivity of one release.
        releases: number of releases about the same user.
        delta: delta of (epsilon, delta)-differential privacy.

    Raises:
        UserError: the accountant is not installed.
    """
    try:
        from opacus.accountants.analysis import rdp
    except ImportError:
        raise UserError("privacy accounting needs Opacus: " + install_extra("privacy")) from None
    rdp_values = rdp.compute_rdp(q=1.0, noise_multiplier=multiplier, steps=releases, orders=list(ORDERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimum at the largest or smallest order is a looser but valid bound
        return float(rdp.get_privacy_spent(orders=list(ORDERS), rdp=rdp_values, delta=delta)[0])
