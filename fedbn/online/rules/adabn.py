"""AdaBN: statistics of all of a user's data, measured in advance."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import Rule


@dataclass(frozen=True)
class AdaBN(Rule):
    """Offline: ``net.calibrate(all_windows, user=..., n0=0)``. The stream does not change the statistics.

    Li, Wang, Shi, Liu, Hou, 2016, https://arxiv.org/abs/1603.04779

    A user without calibration has the source's statistics. The online version of this rule is `cumulative`.
    """

    name = "adabn"
    about = "statistics of all the user's data, measured once (calibrate)"
    source = "Li, Wang, Shi, Liu, Hou 2016, arXiv:1603.04779"
    learns = False
