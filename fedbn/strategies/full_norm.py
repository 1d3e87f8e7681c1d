"""Full normalization: statistics and their gradients track all clients' data (Lian, Liu, AISTATS 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.nn.conversion import convert
from fedbn.strategies.global_pooled import GlobalPooled


@dataclass(frozen=True)
class FullNormStrategy(GlobalPooled):
    """Train with shared running statistics and running statistic gradients. https://arxiv.org/abs/1810.06177

    Moments and statistic gradients are linear in the data, so their mean over clients equals the centralized value; the
    pooled variance is that of the mean second moment. The learning rate must be small compared with ``a``: training
    diverges with momentum or a large rate, hence the clipping. The federated version is this project's own.

    Attributes:
        a: weight of a batch in the running values.
        clip: largest norm of the gradient of all parameters.

    >>> FullNormStrategy(a=0.05).prepare_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))[1].a
    0.05
    """

    name = "full-norm"
    title = "Full Norm"
    about = "shared running statistics in training, with gradients; options a, clip; needs a small lr"
    source = "after Lian & Liu 2019"
    a: float = 0.1
    clip: float = 1.0

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return convert(super().prepare_model(model), "full-norm", a=self.a)

    def on_before_optimizer_step(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), self.clip)
