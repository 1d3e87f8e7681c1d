"""Statistics of all of a user's data, measured once beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import Rule


@dataclass(frozen=True)
class AdaBN(Rule):
    """Offline: ``net.calibrate(all_windows, user=..., n0=0)``, then frozen; the stream itself moves nothing.

    Li, Wang, Shi, Liu, Hou, 2016, https://arxiv.org/abs/1603.04779

    A user who has not been calibrated has the source's statistics. The same rule online is `cumulative`.
    """

    name = "adabn"
    about = "statistics of all the user's data, measured beforehand (calibrate), then frozen"
    source = "Li, Wang, Shi, Liu, Hou 2016, arXiv:1603.04779"
    learns = False
