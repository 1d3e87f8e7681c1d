"""ATP: clients learn test-time adaptation rates for each entry of the trained model (Bao, Wei, Wang, He, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.data.batching import batch_sizes
from fedbn.data.population import Examples
from fedbn.errors import UserError
from fedbn.nn.roles import State
from fedbn.statistics.consensus import Aggregates
from fedbn.strategies.base import NormStrategy, Progress
from fedbn.tta.adaptation_rates import adaptation_step, add_rates, learn_rates


@dataclass(frozen=True)
class ATP(NormStrategy):
    """Global BN in the first rounds; then the model is frozen and clients learn adaptation rates, which are averaged.

    https://arxiv.org/abs/2310.18816, formulas in `fedbn.tta.adaptation_rates`. The online column adapts with
    these rates. The paper's clients learn rates on labeled data that the model was not trained on; here they use their
    training data in recorded order, like a stream.

    Attributes:
        learn: share of the rounds, at the end, in which rates are learned.
        lr: learning rate of the rates; the paper's 0.1 diverges on `hapt`.
        block: windows per batch.
        online: predict with the mean of all adapted states so far; otherwise with the last one.

    >>> ATP().is_frozen(Progress(1, 4)), ATP().is_frozen(Progress(3, 4))
    (False, True)
    """

    name = "atp"
    title = "ATP"
    about = "learns an adaptation rate for each entry of the model; options learn, lr, block, online"
    needs_cross_entropy = True
    source = "Bao et al. 2023"
    depends_on_rounds = True
    learn: float = 0.5
    lr: float = 0.001
    block: int = 20
    online: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.learn < 1 or self.block < 2 or self.lr < 0:
            raise UserError("strategy 'atp': learn must lie in [0, 1), block be at least 2 and lr at least 0")

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return add_rates(model)

    def is_frozen(self, progress: Progress) -> bool:
        """Whether the model is frozen and rates are learned in a round."""
        return progress.round > progress.rounds - int(self.learn * progress.rounds)

    def before_local_training(self, model: nn.Module, data: Examples, progress: Progress) -> State:
        if self.is_frozen(progress):
            learn_rates(model, data, block=self.block, lr=self.lr)
        return {}

    def set_training_mode(self, model: nn.Module, progress: Progress, aggregates: Aggregates = ()) -> None:
        model.train(not self.is_frozen(progress))

    def on_before_optimizer_step(self, model: nn.Module) -> None:
        if not model.training:
            model.zero_grad(set_to_none=True)

    def predict_stream(self, model: nn.Module, x: Tensor) -> Tensor:
        step = adaptation_step(model.eval(), online=self.online)
        return torch.cat([step(rows) for rows in x.split(batch_sizes(len(x), self.block))])
