"""SiloBN: shared scale and shift, local statistics (Andreux, du Terrail, Béguier, Tramel, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.strategies.base import NormStrategy
from fedbn.strategies.ownership import LOCAL


@dataclass(frozen=True)
class SiloBN(NormStrategy):
    """Statistics are specific to a center and stay local; the affine part is shared. https://arxiv.org/abs/2008.07424

    For an unseen center the paper recomputes statistics on unlabeled data, as in the column *recalibrated*.

    >>> str(SiloBN.affine), str(SiloBN.statistics)
    ('shared', 'local')
    """

    name = "silobn"
    title = "SiloBN"
    about = "BN statistics stay local, scale and shift are shared"
    source = "Andreux et al. 2020"
    statistics = LOCAL
