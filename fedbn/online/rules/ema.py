r"""A running average with a constant gain, in two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedbn.online.rules.base import Rule
from fedbn.online.statistics import State


@dataclass(frozen=True)
class Ema(Rule):
    """Exponentially weighted statistics, started at the source: :math:`a=` ``rate``, :math:`r=0`.

    ``form="moments"`` weights all values exactly. ``form="within"`` averages the (unbiased) variances of windows and
    forgets the spread of their means, which is what BN in training mode does; in deep layers that spread is most of
    the variance. Several windows of a user at once are one step with their joint moments.

    Attributes:
        rate: gain of a step.
        form: which variance.
    """

    name = "ema"
    about = "running average with constant gain"
    source = "Ioffe, Szegedy 2015, arXiv:1502.03167"

    rate: float = 0.01
    form: Literal["moments", "within"] = "moments"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("rate", 0, 1)

    def gain(self, state: State, weight: Tensor) -> Tensor:
        return self.rate * weight.clamp(max=1)

    def between(self) -> bool:
        return self.form == "moments"
