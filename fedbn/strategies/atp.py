"""ATP: clients learn how fast each part of the finished model should follow a user (Bao, Wei, Wang, He, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.data.batching import sizes
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import NormStrategy, Progress
from fedbn.tta.adaptation_rates import add_rates, follower, learn_rates


@dataclass(frozen=True)
class ATP(NormStrategy):
    """Global BN for a while; then the model rests, and clients learn its adaptation rates, which are averaged.

    https://arxiv.org/abs/2310.18816, formulas in `fedbn.tta.adaptation_rates`. The online column follows a user by
    these rates. The paper's clients learn rates from labeled data on which the model was not trained; here it is their
    training data, in recorded order, as streams come.

    Attributes:
        learn: share of the rounds, the last ones, in which rates are learnt.
        lr: of the rates; with the paper's 0.1 they diverge on `hapt`.
        block: windows a batch.
        online: answer with the mean of all states adapted so far, otherwise with the last one.

    >>> ATP().resting(Progress(1, 4)), ATP().resting(Progress(3, 4))
    (False, True)
    """

    name = "atp"
    about = "learns a rate for each entry by which users' windows move it; options learn, lr, block, online"
    source = "Bao et al. 2023"
    learn: float = 0.5
    lr: float = 0.001
    block: int = 20
    online: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.learn < 1 or self.block < 2 or self.lr < 0:
            raise UserError("strategy 'atp': learn must lie in [0, 1), block be at least 2 and lr at least 0")

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return add_rates(model)

    def resting(self, progress: Progress) -> bool:
        """Whether the model rests in a round."""
        return progress.round > progress.rounds - int(self.learn * progress.rounds)

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        if self.resting(progress):
            learn_rates(model, data, block=self.block, lr=self.lr)
        return {}

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train(not self.resting(progress))

    def on_before_optimizer_step(self, model: nn.Module) -> None:
        if not model.training:
            model.zero_grad(set_to_none=True)

    def predict_stream(self, model: nn.Module, x: Tensor) -> Tensor:
        step = follower(model.eval(), online=self.online)
        return torch.cat([step(rows) for rows in x.split(sizes(len(x), self.block))])
