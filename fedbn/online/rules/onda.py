"""A running average as BN keeps it in training, over batches of ten."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import State


@dataclass(frozen=True)
class ONDA(Rule):
    """Constant gain 0.1 on the mean and the unbiased variance of each batch; used before they are updated.

    Mancini, Karaoguz, Ricci, Jensfelt, Caputo, 2018, *Kitting in the wild through online domain adaptation*,
    https://arxiv.org/abs/1807.01028

    The paper's batches hold ten images: give ten rows of a user in a call.

    Attributes:
        rate: gain of a batch.
    """

    name = "onda"
    about = "running average of batch mean and variance, gain 0.1"
    source = "Mancini et al. 2018, arXiv:1807.01028"

    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("rate", 0, 1)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return self.rate * weight.clamp(max=1)

    def between(self) -> bool:
        return False
