r"""DUA: running average whose gain decays to a small constant."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.online.rules.base import TrainPass
from fedbn.online.statistics import State


@dataclass(frozen=True)
class DUA(TrainPass):
    r"""Running averages of mean and within-window variance with :math:`a_t = 0.1\,\omega^t + \xi,\ t=1,2,\dots`

    Mirza, Micorek, Possegger, Bischof, 2022, *The norm must go on: dynamic unsupervised domain adaptation by
    normalization*, CVPR, https://arxiv.org/abs/2112.00463

    Only the schedule is implemented; the paper also uses 64 augmented copies of every image. The authors' code
    (https://github.com/jmiemirza/DUA) measures with ``pass=train``.

    Attributes:
        decay: omega.
        floor_gain: xi, the limit of the gain.
    """

    name = "dua"
    about = "running average whose gain decays from 0.1 to 0.005"
    source = "Mirza, Micorek, Possegger, Bischof 2022, arXiv:2112.00463"
    ranges = (("decay", 0, 1), ("floor_gain", 0, 0.9))
    decay: float = 0.94
    floor_gain: float = 0.005

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return (0.1 * self.decay ** (state.t + 1) + self.floor_gain) * weight.clamp(max=1)

    def between(self) -> bool:
        return False
