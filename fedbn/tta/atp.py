"""ATP: one step per block on every part of the network, with rates learned by federated training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbn.errors import UserError
from fedbn.tta.adaptation_rates import RATES, adaptation_step
from fedbn.tta.base import Method, Step


@dataclass(frozen=True)
class ATP(Method):
    """Needs a model trained by the strategy of the same name, which learns the rates (`fedbn.tta.adaptation_rates`).

    Attributes:
        online: predict with the mean of all states adapted so far, otherwise with the last one.

    >>> ATP().block
    20
    """

    name = "atp"
    about = "weights and statistics at learned rates; with --strategy atp"
    source = "Bao et al. 2023, https://arxiv.org/abs/2310.18816"
    includes_current = True
    block: int = 20
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise UserError("method 'atp': a batch of one window has no variance: give block=2 or more")

    def begin(self, model: nn.Module, source: Tensor, draw: torch.Generator) -> Step:
        if RATES not in dict(model.named_buffers()):
            raise UserError("method 'atp' needs a model with learned adaptation rates: train with --strategy atp")
        return adaptation_step(model, online=self.online)
