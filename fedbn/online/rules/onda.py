"""ONDA: running average as in BN's training mode, over batches of ten."""

from __future__ import annotations

from dataclasses import dataclass

from fedbn.online.rules.base import RunningAverage, TrainPass


@dataclass(frozen=True)
class ONDA(RunningAverage, TrainPass):
    """Constant gain 0.1 on the mean and the unbiased variance of each batch, updated after use.

    Mancini, Karaoguz, Ricci, Jensfelt, Caputo, 2018, *Kitting in the wild through online domain adaptation*,
    https://arxiv.org/abs/1807.01028

    The paper's batches have ten images: pass ten rows of a user per call. Public code of the method measures with
    ``pass=train``.

    Attributes:
        rate: gain of a batch.
    """

    name = "onda"
    about = "running average of batch mean and variance, gain 0.1"
    source = "Mancini et al. 2018, arXiv:1807.01028"

    def between(self) -> bool:
        return False
