"""FedWon: no normalization; scaled weight standardization and adaptive gradient clipping (Zhuang, Lyu, ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedbn.errors import UserError
from fedbn.nn.conversion import convert
from fedbn.nn.roles import head, is_below
from fedbn.norms.fedwon import clip_adaptively
from fedbn.strategies.base import StatelessNorm


@dataclass(frozen=True)
class FedWon(StatelessNorm):
    """Independent of the batch, so that a batch size of 1 works. https://arxiv.org/abs/2306.05879

    Attributes:
        clip: largest gradient norm of a unit, relative to its weights (lambda); the classifier is not clipped.

    >>> net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Flatten())
    >>> FedWon().prepare_model(net)[1]
    Identity()
    """

    name = "fedwon"
    title = "FedWon"
    about = "no normalization; standardized weights, clipped steps; option clip (adaptive gradient clipping)"
    source = "after Zhuang & Lyu 2024"
    clip: float = 0.16

    def prepare_model(self, model: nn.Module) -> nn.Module:
        if not self.clip > 0:
            raise UserError(f"fedwon: clip={self.clip} would stop all learning; use a positive number such as 0.16")
        return convert(model, "fedwon")

    def on_before_optimizer_step(self, model: nn.Module) -> None:
        classifier = head(model)
        clip_adaptively([p for n, p in model.named_parameters() if not is_below(n, classifier)], self.clip)
