"""FixBN: standard BN in the first rounds, frozen statistics afterwards (Zhong, Chen, Chao, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.errors import UserError
from fedbn.nn.roles import statistics_layers
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import NormStrategy, Progress


@dataclass(frozen=True)
class FixBN(NormStrategy):
    """Stage 1 is FedAvg with BN; afterwards the aggregated statistics are constants, also in training.

    https://arxiv.org/abs/2303.06530. Only normalization layers switch to evaluation mode: dropout stays active, and
    scale and shift are still trained. The paper also keeps clients' momentum between rounds
    (``--optimizer-state keep``).

    Attributes:
        stage1: share of the rounds in stage 1.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()); FixBN().set_training_mode(net, Progress(6, 10))
    >>> net[0].training, net[1].training
    (False, True)
    """

    name = "fixbn"
    title = "FixBN"
    about = "global BN; statistics frozen after a share of rounds; option stage1 (0.5)"
    source = "Zhong et al. 2023"
    depends_on_rounds = True
    stage1: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.stage1 <= 1:
            raise UserError(f"fixbn: stage1 must be between 0 and 1, not {self.stage1:g}")

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train()
        if progress.round > self.stage1 * progress.rounds:
            for layer in statistics_layers(model).values():
                layer.eval()
