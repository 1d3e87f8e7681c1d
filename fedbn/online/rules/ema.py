r"""Running average with a constant gain, in two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedbn.online.rules.base import RunningAverage, TrainPass


@dataclass(frozen=True)
class Ema(RunningAverage, TrainPass):
    """Exponentially weighted statistics that start from the source: :math:`a=` ``rate``, :math:`r=0`.

    ``form="moments"`` weights all values exactly. ``form="within"`` averages the (unbiased) variances of windows and
    ignores the variance between their means, as BN in training mode does; in deep layers that is most of the variance.
    Several windows of a user in one call are one step with their joint moments.

    Attributes:
        rate: gain of a step.
        form: ``moments`` or ``within``.
    """

    name = "ema"
    about = "running average with constant gain"
    source = "Ioffe, Szegedy 2015, arXiv:1502.03167"
    rate: float = 0.01
    form: Literal["moments", "within"] = "moments"

    def between(self) -> bool:
        return self.form == "moments"
